"""Errors as they come from below, for tests of what is made of them."""

from __future__ import annotations

import errno

import torch

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
)
