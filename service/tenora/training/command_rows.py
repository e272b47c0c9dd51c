"""Rows of commands as packing and passes want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenora.data.dataset import TokenizedDataset
from tenora.training.commands import Row
from tenora.training.packing import PackedRows
from tenora.training.step import TokenLosses


def dataset_of(rows: Sequence[Row]) -> TokenizedDataset:
    """Rows as packing wants them: a token with a weight, whatever it is, is one whose loss is computed."""
    return TokenizedDataset(
        tokens=np.concatenate([np.array(row.tokens, np.int32) for row in rows]),
        weights=np.concatenate([np.array([weight is not None for weight in row.weights], np.uint8) for row in rows]),
        offsets=np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int64),
        lines=np.arange(len(rows), dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class WeightedLoss:
    """Σ weight · loss over the tokens of rows, an objective of `tenora.training.pass_queue`.

    Attributes:
        weights: of each row, float32 on the host, those of the tokens that have one.
    """

    weights: Sequence[Tensor]
    needs_losses = False

    @classmethod
    def of(cls, rows: Sequence[Row]) -> WeightedLoss:
        """That of rows."""
        return cls([torch.tensor([weight for weight in row.weights if weight is not None]) for row in rows])

    def coefficients(self, part: PackedRows, losses: Tensor) -> Tensor:
        """See `Objective`."""
        return torch.cat([self.weights[row] for row in part.rows]).to(losses.device)

    def total(self, losses: Sequence[Tensor]) -> float:
        """The sum itself, from the losses of each row."""
        return sum(float((own.double() * weights).sum()) for own, weights in zip(losses, self.weights, strict=True))


def by_row(parts: Sequence[PackedRows], results: Sequence[TokenLosses]) -> list[Tensor]:
    """The losses of each row on the host, float32 [tokens with a weight]; rows are numbered from 0."""
    found: dict[int, Tensor] = {}
    for part, result in zip(parts, results, strict=True):
        losses = result.loss.cpu()
        for index, row in enumerate(part.rows):
            found[row] = losses[torch.from_numpy(part.target_row == index)]
    return [found[row] for row in sorted(found)]
