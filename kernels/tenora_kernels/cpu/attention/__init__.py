"""Attention over the paged cache and over whole sequences."""
