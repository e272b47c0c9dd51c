"""One checkout beside another, over HTTP: equal answers, equal training, and how fast."""
