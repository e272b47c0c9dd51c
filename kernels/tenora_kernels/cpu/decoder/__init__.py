"""Whole layers as one job: a serving step, and training forward and back."""
