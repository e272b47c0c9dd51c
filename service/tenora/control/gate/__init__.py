"""Whether a result is right, what it is worth, and whether it takes the name over."""
