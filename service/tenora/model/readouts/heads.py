"""k scores of a row from a head of an adapter's own: classes, numbers, a reward; or the row's embedding.

A head of k labels is a shrink of rank k that no expand follows. It lies in `LoraTables` as a row of its own: A [k, H],
and a Bᵀ of no columns. An embedding is what such a head would read.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora.model.readouts.base import Read, Readout, ReadPositions
from tenora.model.readouts.losses import HeadLoss
from tenora_kernels.layout import LoraTables


@dataclass(frozen=True, slots=True)
class Heads:
    """`ReadoutKind` of heads that lie in the tables of a pass, by their adapters' slots.

    Attributes:
        row: of the heads in the tables, with `in_features` H and `out_features` 0; None reads embeddings.
        loss: what they learn.
        mean: they read the mean over their row's tokens, else the last one, which is where the row is read.
    """

    row: int | None
    loss: HeadLoss
    mean: bool = False

    def over(self, decoder: Decoder, where: ReadPositions, /) -> Readout:
        """See `ReadoutKind`."""
        return HeadReadout(decoder, self, where)


@dataclass(frozen=True, slots=True)
class HeadReadout:
    """Heads of one or of many adapters; the gradient of a head is added to `where.tables.grad` if one is wanted."""

    decoder: Decoder
    kind: Heads
    where: ReadPositions

    def pool(self, hidden: Tensor, read_at: Tensor) -> Tensor:
        """What heads read of hidden states [T, H]: [n, H], finished; a mean is one of finished states, and float32."""
        if not self.kind.mean:
            return self.decoder.finish(hidden[read_at])
        starts = torch.from_numpy(self.where.starts).to(hidden.device)
        counts = read_at - starts + 1
        row = torch.repeat_interleave(torch.arange(len(read_at), device=hidden.device), counts)
        within = torch.arange(len(row), device=hidden.device) - (counts.cumsum(0) - counts)[row]
        finished = self.decoder.finish(hidden[starts[row] + within]).float()
        sums = finished.new_zeros(len(read_at), finished.shape[1]).index_add(0, row, finished)
        return sums / counts[:, None]

    def see(self, layer: int, hidden: Tensor, predict_at: Tensor) -> None:
        """See `Readout`; it reads the last layer only."""

    def read(
        self, hidden: Tensor, predict_at: Tensor, targets: Tensor, coefficients: Tensor | None
    ) -> Generator[None, None, Read]:
        """See `Readout`; a target is what `kind.loss` says."""
        wanted = coefficients is not None
        source = hidden.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            pooled = self.pool(source, predict_at)
        below, losses, correct, found = torch.zeros_like(pooled), [], [], []
        for span, slot in self._spans():
            scores = self._scores(pooled.detach()[span], slot).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                rows = self.kind.loss(scores, targets[span])
            losses.append(rows.loss.detach())
            correct.append(rows.correct)
            found.append(scores.detach())
            if coefficients is not None:
                (slope,) = torch.autograd.grad(rows.loss, scores, coefficients[span])
                below[span] = self._backward(slope, pooled.detach()[span], slot)
            yield
        read = Read(_joined(losses, hidden), _joined(correct, hidden), None, _padded(found, hidden))
        if coefficients is None:
            return read
        (above,) = torch.autograd.grad(pooled, source, below)
        return read._replace(slope=above)

    def _spans(self) -> list[tuple[slice, int]]:
        """Positions that lie together and are of one adapter, with its slot."""
        found: list[tuple[slice, int]] = []
        start = 0
        for slot, members in groupby(self.where.slots.tolist()):
            span = slice(start, start + len(list(members)))
            found.append((span, slot))
            start = span.stop
        return found

    def _scores(self, pooled: Tensor, slot: int) -> Tensor:
        """float32 [m, k]."""
        if self.kind.row is None:
            return pooled.float().clone()
        head = self._tables.a(self.kind.row, slot).to(pooled.dtype)
        return (pooled @ head.t()).float()

    def _backward(self, slope: Tensor, pooled: Tensor, slot: int) -> Tensor:
        """From the gradient of scores [m, k] to that of the pooled states [m, H], and to the head's own."""
        if self.kind.row is None:
            return slope.to(pooled.dtype)
        self._tables.grad_a(self.kind.row, slot).add_(slope.t() @ pooled.float())
        head = self._tables.a(self.kind.row, slot)
        return (slope.to(head.dtype) @ head).to(pooled.dtype)

    @property
    def _tables(self) -> LoraTables:
        if self.where.tables is None:
            raise ValueError("a head is read in a pass without adapters.")
        return self.where.tables


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, device=like.device)


def _padded(scores: list[Tensor], like: Tensor) -> Tensor:
    """Scores of several heads as one [n, widest]: those of fewer labels end in zeros."""
    widest = max((part.shape[1] for part in scores), default=0)
    found = torch.zeros(sum(len(part) for part in scores), widest, device=like.device)
    ends = np.cumsum([0, *(len(part) for part in scores)])
    for start, part in zip(ends[:-1], scores, strict=True):
        found[start : start + len(part), : part.shape[1]] = part
    return found
