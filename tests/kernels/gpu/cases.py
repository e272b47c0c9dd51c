"""What the checks in the interpreter and those on a device share."""

from __future__ import annotations

import torch
from torch import Tensor

from tenora_kernels.gpu import backend
from tenora_kernels.layout import LoraBatch, build_segments
from tenora_kernels.reference import add_lora_reference
from tests.kernels.cases import PARTIAL, TOLERANCE, Case, shuffled

MIXED = [[r] * 7 for r in (1, 4, 8, 16, 33, 64)]

# Small enough for the interpreter, which takes milliseconds for every program.
LAYOUTS = {
    "mixed, a quarter base": (shuffled(40, 6, 1), MIXED),
    "sorted run": (sorted(shuffled(40, 6, 2)), MIXED),
    "one for all": ([4] * 17, MIXED),
    "all distinct": ([5, 3, 1, 0, 4, 2], MIXED),
    "all base": ([-1] * 9, MIXED),
    "partial targets": (shuffled(32, 4, 3), PARTIAL),
    "no module at all": ([3, 3, -1], PARTIAL),
    "one row": ([2], MIXED),
    "no rows": ([], MIXED),
}

# The interpreter truncates where a device rounds: one ulp of bf16 instead of half.
INTERPRETED = {torch.float32: TOLERANCE[torch.float32], torch.bfloat16: 2**-7, torch.float16: 2**-10}


def reference(case: Case) -> Tensor:
    """The float64 result of a case."""
    return add_lora_reference(case.y, case.x, case.site, case.tables, case.slots)


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
