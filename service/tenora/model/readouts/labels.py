"""k scores of a position from a head of an adapter's own: classes, or with k = 1 a reward or a value.

A head of k labels is a shrink of rank k that no expand follows. It lies in `LoraTables` as a row of its own: A [k, H],
and a Bᵀ of no columns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora.model.readouts.base import Read, Readout
from tenora_kernels.layout import LoraTables


@dataclass(frozen=True, slots=True)
class Labels:
    """`ReadoutKind` of heads that lie in tables by their adapters' slots.

    Attributes:
        tables: those of now, which are others whenever an adapter comes or goes.
        row, normalised: see `LabelReadout`.
    """

    tables: Callable[[], LoraTables]
    row: int
    normalised: bool = True

    def over(self, decoder: Decoder, slots: npt.NDArray[np.int64], /) -> Readout:
        """See `ReadoutKind`."""
        return LabelReadout(decoder, self.tables(), self.row, slots.tolist(), self.normalised)


@dataclass(frozen=True, slots=True)
class LabelReadout:
    """Heads of one or of many adapters.

    Attributes:
        decoder: the base.
        tables: where the heads lie; dA is added to `tables.grad` if a gradient is wanted.
        row: of the heads in the tables, with `in_features` H and `out_features` 0.
        slots: [n], whose head reads each position.
        normalised: the loss is minus the target's log-probability among the labels; otherwise it is minus the
            target's score itself, for objectives that compare scores (with one label a reward, a value).
    """

    decoder: Decoder
    tables: LoraTables
    row: int
    slots: Sequence[int]
    normalised: bool = True

    def scores(self, finished: Tensor) -> list[tuple[slice, Tensor]]:
        """Of finished hidden states [n, H] those that lie together and share a head, with their scores [m, k]."""
        found: list[tuple[slice, Tensor]] = []
        start = 0
        for slot, members in groupby(self.slots):
            span = slice(start, start + len(list(members)))
            head = self.tables.a(self.row, slot).to(finished.dtype)
            found.append((span, (finished[span] @ head.t()).float()))
            start = span.stop
        return found

    def read(
        self, hidden: Tensor, predict_at: Tensor, targets: Tensor, coefficients: Tensor | None
    ) -> Generator[None, None, Read]:
        """See `Readout`; a target is a label of its position's head."""
        wanted = coefficients is not None
        source = hidden.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            finished = self.decoder.finish(source[predict_at])
        loss, correct = torch.zeros(len(targets), device=hidden.device), torch.zeros_like(targets, dtype=torch.bool)
        below = torch.zeros_like(finished)
        for span, scores in self.scores(finished.detach()):
            target = targets[span, None]
            normalizer = scores.logsumexp(dim=1, keepdim=True) if self.normalised else torch.zeros_like(scores[:, :1])
            loss[span] = (normalizer - scores.gather(1, target))[:, 0]
            correct[span] = scores.argmax(dim=1) == target[:, 0]
            if coefficients is not None:
                slope = (scores - normalizer).exp() if self.normalised else torch.zeros_like(scores)
                slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
                slope.mul_(coefficients[span, None])
                below[span] = self._backward(slope, finished.detach()[span], self.slots[span.start])
            yield
        if coefficients is None:
            return Read(loss, correct, None)
        (above,) = torch.autograd.grad(finished, source, below)
        return Read(loss, correct, above)

    def _backward(self, slope: Tensor, finished: Tensor, slot: int) -> Tensor:
        """From the gradient of scores [m, k] to that of the finished states [m, H], and to the head's own."""
        self.tables.grad_a(self.row, slot).add_(slope.t() @ finished.float())
        head = self.tables.a(self.row, slot)
        return (slope.to(head.dtype) @ head).to(finished.dtype)
