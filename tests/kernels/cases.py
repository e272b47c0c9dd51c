"""Random adapters and batches for the low-rank op, and the tolerances it is held to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora_kernels import torch_backend
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

# Relative to the largest value of the result: float sums in another order, and one rounding of y to its own type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

QKV = LoraSite(row=0, in_features=48, slices=((0, 48), (48, 64), (64, 80)))
GATE_UP = LoraSite(row=4, in_features=48, slices=((0, 72), (72, 144)))
DOWN = LoraSite(row=6, in_features=72, slices=((0, 48),))
IN = (48, 48, 48, 48, 48, 48, 72)
OUT = (48, 16, 16, 48, 72, 72, 48)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = {"torch": torch_backend, "numba": lora}
# Every backend with every type that it takes.
ON_EVERY_BACKEND = [("torch", dtype) for dtype in DTYPES] + [("numba", torch.float32), ("numba", torch.bfloat16)]

MIXED = [[r] * 7 for r in (1, 4, 8, 16, 33, 64, 128)]
PARTIAL = [[8, 0, 8, 0, 0, 4, 0], [0, 0, 0, 2, 2, 2, 2], [3, 5, 7, 9, 11, 13, 15], [0] * 7]


def shuffled(count: int, slots: int, seed: int) -> list[int]:
    """A quarter of the rows base, the others spread over the slots, in random order."""
    order = [-1 if i % 4 == 0 else i % slots for i in range(count)]
    random.Random(seed).shuffle(order)
    return order


LAYOUTS = {
    "mixed, a quarter base": (shuffled(40, 7, 1), MIXED),
    "sorted run": (sorted(shuffled(40, 7, 2)), MIXED),
    "long segments": (shuffled(160, 2, 4), [[33] * 7, [16] * 7]),
    "one for all": ([4] * 17, MIXED),
    "the largest for all": ([6] * 130, MIXED),
    "all distinct": ([5, 3, 1, 6, 0, 4, 2], MIXED),
    "slots without rows": ([2, 5, 5, -1, 2], MIXED),
    "all base": ([-1] * 9, MIXED),
    "partial targets": (shuffled(32, 4, 3), PARTIAL),
    "no module at all": ([3, 3, -1], PARTIAL),
    "one row": ([2], MIXED),
    "no rows": ([], MIXED),
}


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
    ranks: Sequence[Sequence[int]], dtype: torch.dtype, *, train: bool = False, seed: int = 0, is_bf16: bool = False
) -> LoraTables:
    """Tables with `ranks[slot][row]`, random weights that keep y of order one, a scaling per module.

    With `is_bf16`, every other slot of a float32 arena holds bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(r * (i + o) for slot in ranks for r, i, o in zip(slot, IN, OUT, strict=True))
    arena = torch.randn(size + 64, generator=generator, dtype=torch.float64).mul_(0.2).to(dtype)
    grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.zeros(size + 64, dtype=grad_dtype) if train else None
    tables = LoraTables.empty(arena, in_features=IN, out_features=OUT, slots=len(ranks), grad=grad)
    offset = 32  # nothing may rely on an adapter that starts at 0
    for slot, slot_ranks in enumerate(ranks):
        scaling = [0.5 + 0.25 * ((slot + row) % 4) for row in range(len(IN))]
        offset += tables.place(slot, offset, slot_ranks, scaling, is_bf16=is_bf16 and slot % 2 == 0)
        if tables.is_bf16[slot]:
            for row in range(len(IN)):
                for matrix in (tables.a(row, slot), tables.bt(row, slot)):
                    values = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
                    matrix.copy_(values.mul_(0.2))
    return tables


def make_case(
    slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    site: LoraSite = QKV,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    seed: int = 0,
    is_bf16: bool = False,
    weights: torch.dtype | None = None,
) -> Case:
    """Random x and y of `dtype` for rows in `slots`; the adapters too, unless `weights` is another type."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows, width = len(slots), site.slices[-1][1]
    x = torch.randn(rows, site.in_features, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    tables = make_tables(ranks, weights or dtype, train=train, seed=seed, is_bf16=is_bf16)
    return Case(y, x, site, tables, list(slots))


def worst(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    if wanted.numel() == 0:
        return 0.0
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1.0))
