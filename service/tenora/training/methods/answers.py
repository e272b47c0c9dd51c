"""Learning answers: the mean cross-entropy of all learned tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenora.errors import TrainingError
from tenora.training.methods.method import Figures, Learning
from tenora.training.packing import PackedRows

if TYPE_CHECKING:
    from torch import Tensor

    from tenora.training.step import TokenLosses


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
        return losses.new_full((len(part.targets),), 1.0 / self.tokens)


class AnswerLearning(Learning):
    """Needs to know nothing but the rows."""

    def objective(self, parts: Sequence[PackedRows]) -> MeanLoss:
        """See `Learning`."""
        return MeanLoss(_tokens(parts))

    def measure(self, step: int, parts: Sequence[PackedRows], found: Sequence[TokenLosses]) -> Figures:
        """See `Learning`; a loss of exactly 0 has nothing left to learn."""
        count = _tokens(parts)
        loss = sum(float(part.loss.double().sum()) for part in found) / count
        if loss == 0.0:
            raise TrainingError(
                f"The loss of step {step} is exactly 0 over {count} tokens: the rows are memorised or their answers "
                "are all alike; use fewer epochs, a lower learning rate or more varied rows.",
                code="zero_loss",
            )
        return Figures(loss, sum(int(part.correct.sum()) for part in found) / count)


def _tokens(parts: Sequence[PackedRows]) -> int:
    return sum(len(part.targets) for part in parts)
