"""Tests of `tenora.model.executors`."""
