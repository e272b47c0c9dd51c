"""Random adapters and batches for the low-rank op, and the tolerances it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

# Relative to the largest value of the result: float sums in another order, and one rounding of y to its own type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

QKV = LoraSite(row=0, in_features=48, slices=((0, 48), (48, 64), (64, 80)))
GATE_UP = LoraSite(row=4, in_features=48, slices=((0, 72), (72, 144)))
DOWN = LoraSite(row=6, in_features=72, slices=((0, 48),))
IN = (48, 48, 48, 48, 48, 48, 72)
OUT = (48, 16, 16, 48, 72, 72, 48)


@dataclass
class Case:
    """Tensors of one call and the slot of each row."""

    y: Tensor
    x: Tensor
    site: LoraSite
    tables: LoraTables
    slots: list[int]

    @property
    def batch(self) -> LoraBatch:
        return LoraBatch(self.tables, build_segments(self.slots))

    def width(self) -> int:
        return self.site.slices[-1][1]


def make_tables(
    ranks: Sequence[Sequence[int]], dtype: torch.dtype, *, train: bool = False, seed: int = 0
) -> LoraTables:
    """Tables with `ranks[slot][row]`, random weights that keep y of order one, a scaling per module."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(r * (i + o) for slot in ranks for r, i, o in zip(slot, IN, OUT, strict=True))
    arena = torch.randn(size + 64, generator=generator, dtype=torch.float64).mul_(0.2).to(dtype)
    grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.zeros(size + 64, dtype=grad_dtype) if train else None
    tables = LoraTables.empty(arena, in_features=IN, out_features=OUT, slots=len(ranks), grad=grad)
    offset = 32  # nothing may rely on an adapter that starts at 0
    for slot, slot_ranks in enumerate(ranks):
        scaling = [0.5 + 0.25 * ((slot + row) % 4) for row in range(len(IN))]
        offset += tables.place(slot, offset, slot_ranks, scaling)
    return tables


def make_case(
    slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    site: LoraSite = QKV,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    seed: int = 0,
) -> Case:
    """Random x and y of `dtype` for rows in `slots`."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows, width = len(slots), site.slices[-1][1]
    x = torch.randn(rows, site.in_features, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    return Case(y, x, site, make_tables(ranks, dtype, train=train, seed=seed), list(slots))


def worst(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    if wanted.numel() == 0:
        return 0.0
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1.0))
