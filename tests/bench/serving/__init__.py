"""The serving benchmark: servers of our own, cases by name."""
