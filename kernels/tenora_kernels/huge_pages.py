"""Memory for weights: read in long runs, from end to end, at every step."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

__all__ = ["empty"]


def empty(elements: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor [elements] on the CPU, in huge pages where the system has them.

    Pages are taken from the system when they are first written. With pages of 4 KiB a run of weights costs a look-up
    every 64 cache lines, which is 5 to 10 % of a decode step.
    """
    if elements == 0:
        return torch.empty(0, dtype=dtype)
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
