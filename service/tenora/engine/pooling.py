"""What is made of a prompt's hidden states instead of tokens: one of them or their mean, or a head's scores of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora.adapters.table_rows import RowKind, TableRows
from tenora.engine.messages import Pool
from tenora.engine.scheduler import Scheduled
from tenora_kernels.layout import LoraTables


def layers_of(batch: Collection[Scheduled]) -> tuple[int, ...]:
    """The layers whose states a step has to give: -1, from which tokens come, and those that are pooled."""
    return tuple({-1, *(item.sequence.request.layer for item in batch if isinstance(item.sequence.request, Pool))})


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of the adapters of a pool.

    Attributes:
        tables: the adapters' weights.
        weight, bias: which of their rows hold the heads, one below the other.
    """

    tables: LoraTables
    weight: int
    bias: int

    @classmethod
    def of(cls, tables: LoraTables, rows: TableRows) -> Heads:
        """Those of the adapters in `tables`, whose rows are `rows`."""
        return cls(tables, rows.row(RowKind.HEAD), rows.row(RowKind.HEAD_BIAS))

    def scores(self, slot: int, rows: tuple[int, int], pooled: Tensor) -> Tensor | None:
        """What rows [start, stop) of the slot's heads make of a pooled state, float32 [H] on the CPU.

        In float64, row by row, so that it is the same whatever else the step holds.

        Returns:
            float32 [stop - start]; None if the adapter has no such rows.
        """
        start, stop = rows
        if slot < 0 or stop > self.tables.rank(self.weight, slot):
            return None
        scores = (self.tables.a(self.weight, slot)[start:stop].cpu().double() * pooled.double()).sum(-1)
        if stop <= self.tables.rank(self.bias, slot):
            scores += self.tables.a(self.bias, slot)[start:stop, 0].cpu().double()
        return scores.float()


def pooled(item: Scheduled, request: Pool, states: Tensor, heads: Heads | None) -> Tensor | None:
    """Look at the states [count, H] of the item's tokens at the layer that is pooled.

    Returns:
        The answer, float32 on the CPU, once the sequence's end is reached; empty if there are no such rows of a head.
    """
    summed = item.sequence.summed
    if request.pooling == "mean":
        summed.add(item.start, states.float().cpu().numpy())
    if not item.samples:
        return None
    state = torch.from_numpy(summed.mean()) if request.pooling == "mean" else states[-1].float().cpu()
    if request.head is None:
        return state
    scores = None if heads is None else heads.scores(item.sequence.slot, request.head, state)
    return torch.empty(0) if scores is None else scores
