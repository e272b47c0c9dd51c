"""What training minimises: cross-entropy per learned token, or DPO on pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tenora.training.packing import PackedRows
from tenora.training.spec import Rewards

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MeanLoss:
    """The mean over all learned tokens of an optimizer step, however they lie in parts.

    Attributes:
        tokens: learned tokens of the step.
    """

    tokens: int
    needs_losses = False

    def coefficients(self, part: PackedRows, losses: Tensor) -> Tensor:
        """See `Objective`."""
        return torch.full((len(part.targets),), 1.0 / self.tokens, device=losses.device)


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), the mean over the pairs of a step.

    -log sigmoid(β · ((log π(c) - log π_ref(c)) - (log π(r) - log π_ref(r)))), log π of a row the sum over its learned
    tokens. Rows 2i and 2i + 1 of the dataset are the chosen and the rejected answer of a pair, and lie in one
    part.

    Attributes:
        beta: β.
        pairs: of the step.
        reference: float32 [rows of the dataset], log π_ref.
    """

    beta: float
    pairs: int
    reference: Float32Array
    needs_losses = True

    def coefficients(self, part: PackedRows, losses: Tensor) -> Tensor:
        """See `Objective`: of a chosen token β · sigmoid(-margin) / pairs, of a rejected one the negative."""
        chosen, rejected = self.rewards(part, losses)
        slope = torch.sigmoid(rejected - chosen) * (self.beta / self.pairs)
        of_row = torch.stack((slope, -slope), dim=1).flatten()
        return of_row[torch.from_numpy(part.target_row).to(losses.device)]

    def rewards(self, part: PackedRows, losses: Tensor) -> tuple[Tensor, Tensor]:
        """β · (log π - log π_ref) of the chosen and the rejected answers, two float32 [pairs of the part]."""
        rows = row_sums(part, losses).neg() - torch.from_numpy(self.reference[list(part.rows)]).to(losses.device)
        return self.beta * rows[0::2], self.beta * rows[1::2]

    def loss(self, part: PackedRows, losses: Tensor) -> Tensor:
        """Per pair, float32 [pairs of the part]."""
        chosen, rejected = self.rewards(part, losses)
        return -F.logsigmoid(chosen - rejected)


def row_sums(part: PackedRows, losses: Tensor) -> Tensor:
    """The losses [n] of a part summed per row, float32 [rows of the part]."""
    sums = torch.zeros(len(part.rows), dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, torch.from_numpy(part.target_row).to(losses.device), losses.double()).float()


@dataclass(slots=True)
class RewardSums:
    """Sums over pairs, from which the means of a step or an evaluation are made."""

    pairs: int = 0
    loss: float = 0.0
    correct: int = 0
    chosen: float = 0.0
    rejected: float = 0.0

    def add(self, objective: PreferenceLoss, part: PackedRows, losses: Tensor) -> None:
        """Take the pairs of a part."""
        chosen, rejected = objective.rewards(part, losses)
        self.pairs += len(chosen)
        self.loss += float(objective.loss(part, losses).double().sum())
        self.correct += int((chosen > rejected).sum())
        self.chosen += float(chosen.double().sum())
        self.rejected += float(rejected.double().sum())

    @property
    def means(self) -> Rewards:
        """Rewards per pair."""
        pairs = max(self.pairs, 1)
        return Rewards(
            chosen=self.chosen / pairs, rejected=self.rejected / pairs, margin=(self.chosen - self.rejected) / pairs
        )
