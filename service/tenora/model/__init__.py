"""The frozen decoder: attention, projections with adapters, weight loading, tokenizer."""
