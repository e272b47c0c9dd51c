"""What the checks in the interpreter and those on a device share."""

from __future__ import annotations

import torch
from torch import Tensor

from tenora_kernels.gpu import backend
from tenora_kernels.layout import LoraBatch, build_segments
from tests.kernels.cases import TOLERANCE, Case

# The interpreter truncates where a device rounds: one ulp of bf16 instead of half.
INTERPRETED = {torch.float32: TOLERANCE[torch.float32], torch.bfloat16: 2**-7, torch.float16: 2**-10}


def batch_of(case: Case) -> LoraBatch:
    """The case's batch, its rows where its tensors are."""
    return LoraBatch(case.tables, build_segments(case.slots, device=case.y.device))


def forward(case: Case) -> Tensor:
    """y after the backend's forward, the case's own y unchanged."""
    y = case.y.clone()
    backend.forward(y, case.x, case.site, batch_of(case))
    return y


def edit(case: Case, table: str, row: int, slot: int, value: float) -> None:
    """Write to a table by hand, and say so to its mirrors."""
    getattr(case.tables, table)[row, slot] = value
    case.tables.version += 1
