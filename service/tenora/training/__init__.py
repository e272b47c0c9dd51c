"""Datasets to packed batches, losses, the training step, evaluation. Free of jobs, tenants and HTTP."""
