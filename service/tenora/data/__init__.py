"""Training files: from bytes to tokenized rows. Free of torch."""
