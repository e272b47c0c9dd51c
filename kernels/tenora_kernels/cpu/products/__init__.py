"""Products with packed weights, and what is done row by row."""
