"""The ranks that an adapter made of a full fine-tuning is tried with. Free of torch."""

from __future__ import annotations

SERVED_RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Mean ranks over all matrices, ascending: the first one that the gate lets through is served."""
