"""Sequences in a poisoned paged cache, and what attention to them should give."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tenora_kernels.cpu.attention.attention import PagedStep, Rope, allocate_cache
from tenora_kernels.cpu.runtime.team import Team

Schedule = list[list[tuple[int, int]]]
"""Steps; a step is (sequence, number of its next tokens) in stream order."""


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int


def reference(qkv: Tensor, shape: Shape, window: int | None) -> Tensor:
    """Attention of one sequence [T, Hq + 2 Hkv, D] in float64, [T, Hq · D]: the specification."""
    q, k, v = torch.split(qkv.double(), [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / shape.dim**0.5
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


class PagedCase:
    """Random sequences whose blocks are shuffled. What nobody wrote is NaN; table entries beyond are out of range."""

    def __init__(
        self, shape: Shape, lengths: list[int], *, block_size: int = 16, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.shape, self.block_size = shape, block_size
        rows = shape.heads + 2 * shape.kv_heads
        self.sequences = [torch.randn(n, rows, shape.dim, generator=generator).to(dtype) for n in lengths]
        for sequence in self.sequences:
            sequence[:, : shape.heads] *= 2
        needed = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
        self.tables = np.full((len(lengths), max(needed) + 1), 1_000_000, np.int32)
        for sequence, count in enumerate(needed):
            self.tables[sequence, :count] = [order.pop() for _ in range(count)]
        self.cache = allocate_cache(sum(needed) + 2, block_size, shape.kv_heads, shape.dim, dtype)
        for tensor in self.cache:
            tensor.fill_(float("nan"))

    def run(
        self,
        schedule: Schedule,
        window: int | None = None,
        *,
        team: Team | None = None,
        tables: list[Rope] | None = None,
        norm: Tensor | None = None,
    ) -> list[Tensor]:
        """Run every step; gives the rows of each sequence. `tables`: cos and sin of each sequence's positions."""
        done = [0] * len(self.sequences)
        rows: list[list[Tensor]] = [[] for _ in self.sequences]
        for work in schedule:
            bounds = [(done[sequence], done[sequence] + count) for sequence, count in work]
            parts = [(sequence, *bound) for (sequence, _), bound in zip(work, bounds, strict=True)]
            slots = [self.slot(sequence, at) for sequence, start, stop in parts for at in range(start, stop)]
            starts = np.cumsum([0, *(count for _, count in work)])
            step = PagedStep(
                slots, starts, [stop for _, stop in bounds], self.tables[[sequence for sequence, _ in work]], team=team
            )
            qkv = torch.cat([self.sequences[sequence][start:stop] for sequence, start, stop in parts])
            rope = None
            if tables is not None:
                rope = Rope(
                    torch.cat([tables[sequence].cos[start:stop] for sequence, start, stop in parts]),
                    torch.cat([tables[sequence].sin[start:stop] for sequence, start, stop in parts]),
                )
            heads, kv_heads = self.shape.heads, self.shape.kv_heads
            q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
            out = step.attend(q, k, v, self.cache, window, rope=rope, norm=norm, eps=1e-6)
            for (sequence, _, stop), (first, last) in zip(parts, pairwise(starts.tolist()), strict=True):
                rows[sequence].append(out[first:last])
                done[sequence] = stop
        return [torch.cat(part) if part else torch.empty(0) for part in rows]

    def slot(self, sequence: int, position: int) -> int:
        """Where a position lies in the cache."""
        return int(self.tables[sequence, position // self.block_size]) * self.block_size + position % self.block_size

    def expected(self, window: int | None = None) -> list[Tensor]:
        """What `run` should give when nothing is turned."""
        return [reference(sequence, self.shape, window) for sequence in self.sequences]


def whole(lengths: list[int]) -> Schedule:
    """Everything in one step."""
    return [list(enumerate(lengths))]


def token_by_token(lengths: list[int]) -> Schedule:
    """One token of each sequence in each step, in an order that changes."""
    steps = []
    for position in range(max(lengths)):
        work = [(sequence, 1) for sequence, length in enumerate(lengths) if position < length]
        steps.append(work[::-1] if position % 2 else work)
    return steps
