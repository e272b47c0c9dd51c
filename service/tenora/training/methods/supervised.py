"""Supervised fine-tuning: cross-entropy of the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenora.errors import TrainingError
from tenora.training.methods.method import Figures, Learner, Learning, Method
from tenora.training.packing import PackedRows
from tenora.training.settings import USUAL_METHOD

if TYPE_CHECKING:
    from torch import Tensor

    from tenora.training.step import TokenLosses


class Supervised(Method):
    """The usual rate and epochs were chosen by held-out loss of SmolLM2-135M; see `tenora.training.recipes`."""

    name = USUAL_METHOD
    summary = "learns the answers of its rows"
    learning_rate = 5e-4
    small_file_epochs = 3
    cross_validates = True

    def learning(self, learner: Learner) -> Learning:
        """See `Method`."""
        return SupervisedLearning(learner)


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


class SupervisedLearning(Learning):
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


METHOD = Supervised()
