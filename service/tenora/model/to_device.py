"""Copies to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; itself if it is there already.

    A GPU copies from pinned memory by itself, so that nobody waits: neither for the copy nor for what the GPU has to
    do before it. torch keeps the pinned memory until the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
