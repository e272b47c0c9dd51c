"""Batched low-rank operations: tensors in, tensors out."""
