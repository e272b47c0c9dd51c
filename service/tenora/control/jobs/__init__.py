"""Fine-tuning jobs as they are asked for, planned, estimated and told."""
