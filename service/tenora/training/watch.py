"""What ends a run that cannot come to anything: numbers that are not finite, and a loss that only grows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tenora.errors import TrainingError
from tenora.training.corpus import Corpus
from tenora.training.packing import PackedRows
from tenora.training.step import TokenLosses

DIVERGED_NATS = 3.0  # above the start's loss, and
DIVERGED_RATIO = 2.0  # times it, in
DIVERGED_STEPS = 3  # steps on end: the run is beyond repair, and every further step would be wasted


class Watch:
    """Over the steps of one learner. Steps count from 1; each check raises TrainingError."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._high_steps = 0

    def learns(self, step: int, parts: Sequence[PackedRows]) -> None:
        """There is something to learn in the step's rows."""
        if not any(len(part.targets) for part in parts):
            raise TrainingError(
                f"Step {step} has no learned token in any of {self._where(parts)}; remove these rows.",
                code="no_trainable_tokens",
            )

    def losses(self, step: int, parts: Sequence[PackedRows], found: Sequence[TokenLosses]) -> None:
        """The loss of every token is finite; the message names the rows where it is not."""
        for part, measured in zip(parts, found, strict=True):
            finite = measured.loss.isfinite().cpu().numpy()
            if not finite.all():
                rows = sorted({part.rows[row] for row in part.target_row[~finite]})
                raise self._not_finite(step, "loss", self._corpus.where(rows))

    def gradient(self, step: int, parts: Sequence[PackedRows], norm: float) -> None:
        """The norm of the step's gradient is finite."""
        if not math.isfinite(norm):
            raise self._not_finite(step, "gradient", self._where(parts))

    def course(self, step: int, parts: Sequence[PackedRows], loss: float, start: float | None) -> None:
        """The loss is not far above the start's, step after step; `start` is None as long as that is not known."""
        high = start is not None and loss > start + DIVERGED_NATS and loss > DIVERGED_RATIO * start
        self._high_steps = self._high_steps + 1 if high else 0
        if self._high_steps >= DIVERGED_STEPS:
            raise TrainingError(
                f"The run diverges: the loss of step {step} is {loss:.2f}, far above the start's "
                f"{start:.2f} for {DIVERGED_STEPS} steps, in a batch with {self._where(parts)} of the training "
                "file; lower the learning rate.",
                code="diverged",
            )

    def evaluation(self, step: int, *losses: float) -> None:
        """The held-out losses are finite."""
        if not all(math.isfinite(loss) for loss in losses):
            cause = f"after step {step}" if step else "of the base, before any step,"
            advice = "lower the learning rate" if step else "look at the validation rows"
            raise TrainingError(f"The held-out loss {cause} is not a finite number; {advice}.", code="non_finite")

    def _not_finite(self, step: int, what: str, where: str) -> TrainingError:
        return TrainingError(
            f"The {what} of step {step} is not a finite number, in a batch with {where} of the training file; lower "
            "the learning rate, or look at these rows.",
            code="non_finite",
        )

    def _where(self, parts: Sequence[PackedRows]) -> str:
        return self._corpus.where([row for part in parts for row in part.rows])
