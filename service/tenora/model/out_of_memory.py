"""Whether an error says that memory ran out: one answer for serving and training."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host's or the accelerator's memory did not suffice.

    Accelerators raise a type of their own. torch's CPU allocator raises a RuntimeError, and the system an OSError, that
    only their words tell apart from others: "can't allocate memory", "Cannot allocate memory".
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
