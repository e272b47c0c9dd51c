"""Adapters, their versions and content, and what a model name means."""
