"""The PEFT format on disk, the immutable store, and the slot pool."""
