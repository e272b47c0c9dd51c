"""Direct preference optimisation (Rafailov et al. 2023): of two answers to a prompt, the chosen one more likely."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tenora.data.rows import PREFERENCES
from tenora.training.methods.method import Figures, Float64Array, Learner, Learning, Method, Unit
from tenora.training.packing import PackedRows
from tenora.training.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor

    from tenora.training.evaluation import Evaluation
    from tenora.training.step import TokenLosses

Float32Array = npt.NDArray[np.float32]


class DirectPreference(Method):
    """It starts at a tenth of the supervised rate.

    Its loss compares sums over whole answers, not means per token, so a step of the same size moves the policy much
    further; and the optimum lies close to the starting adapter, which is what beta asks for. With too high a rate the
    margin still grows while the likelihood of the chosen answers falls too. Published recipes step down by as much or
    more (Zephyr, Tunstall et al. 2023: 2e-5 then 5e-7). A second pass over the pairs is the most that is taken by
    itself: accuracy on held-out pairs peaks early.
    """

    name = "dpo"
    summary = "learns which of two answers is preferred"
    rows = PREFERENCES
    learning_rate = 5e-5
    settings = (
        Setting(
            "How strongly the policy is held to the adapter that it starts from.",
            name="beta",
            least=1e-6,
            most=10,
            auto="0.1",
            default=0.1,
        ),
    )
    has_reference = True
    no_few_shot = (
        "Preferences are measured beside what training started from, with the same prompt; examples in the prompt "
        "have no such figure."
    )
    unit = Unit("nats per pair", examples="pairs")
    metrics = MappingProxyType(
        {
            "rewards/chosen": "Mean implicit reward of the chosen answers.",
            "rewards/rejected": "Mean implicit reward of the rejected answers.",
            "rewards/margins": "Mean of how much higher the chosen answer's is.",
        }
    )
    """Under the names that TRL gives them."""
    loss_note = "The loss is DPO's, log 2 where training started: what is lower prefers the chosen answers more."
    accuracy_label = "Pairs whose chosen answer is preferred"
    start_has_accuracy = False

    def learning(self, learner: Learner) -> Learning:
        """See `Method`."""
        return PreferenceLearning(learner)

    def example_losses(self, settings: Mapping[str, Any], rows: Float64Array, start: Float64Array) -> Float64Array:
        """See `Method`: log 2 is the start's, and less prefers the chosen answer more."""
        rewards = settings["beta"] * (start - rows)
        found: Float64Array = np.logaddexp(0.0, rewards[:, 1] - rewards[:, 0])
        return found


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Equation 7 of the paper, the mean over the pairs of a step.

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
        from tenora.training.objectives import of_tokens, row_sums

        chosen, rejected = rewards(self.beta, row_sums(part, losses), self.reference[list(part.rows)])
        slope = (rejected - chosen).sigmoid() * (self.beta / self.pairs)
        of_row = slope.repeat_interleave(2)
        of_row[1::2].neg_()
        return of_tokens(part, of_row)


def rewards(beta: float, rows: Tensor, reference: Float32Array) -> tuple[Tensor, Tensor]:
    """The implicit rewards β · (log π - log π_ref) of the chosen and of the rejected answers, two float32 [pairs].

    Args:
        rows: float32 [rows], losses summed over a row's learned tokens.
        reference: float32 [rows], log π_ref.
    """
    found = rows.neg() - rows.new_tensor(reference)
    return beta * found[0::2], beta * found[1::2]


class PreferenceLearning(Learning):
    """Held to what it starts from: the reference is measured once a row, under the starting adapter or the base."""

    def __init__(self, learner: Learner) -> None:
        """The starting adapter is kept, frozen, beside the one in training."""
        super().__init__(learner)
        self._beta: float = METHOD.own_settings(learner.spec.method_settings)["beta"]
        self._log_pi_ref = np.full(len(learner.corpus.train), np.nan, np.float32)  # of each row, once it was computed
        self._start = learner.frozen_copy() if learner.spec.init_path else None

    def prepare(self, parts: Sequence[PackedRows]) -> Generator[None, None, None]:
        """See `Learning`: log π_ref of the rows that do not have it yet."""
        from tenora.training.objectives import row_sums

        missing = [part for part in parts if np.isnan(self._log_pi_ref[list(part.rows)]).any()]
        found = yield from self.learner.measured(missing, self._start)
        for part, measured in zip(missing, found, strict=True):
            self._log_pi_ref[list(part.rows)] = -row_sums(part, measured.loss).cpu().numpy()

    def objective(self, parts: Sequence[PackedRows]) -> PreferenceLoss:
        """See `Learning`."""
        return PreferenceLoss(self._beta, sum(len(part.rows) for part in parts) // 2, self._log_pi_ref)

    def measure(self, step: int, parts: Sequence[PackedRows], found: Sequence[TokenLosses]) -> Figures:
        """See `Learning`: per pair; the accuracy is how often the chosen answer had the higher reward."""
        from tenora.training.objectives import row_sums

        rows = [row for part in parts for row in part.rows]
        losses = [row_sums(part, measured.loss).tolist() for part, measured in zip(parts, found, strict=True)]
        figures, _ = self._figures([loss for part in losses for loss in part], self._log_pi_ref[rows])
        return figures

    def judge(self, found: Evaluation, start: Sequence[float] | None) -> Evaluation:
        """See `Learning`: the start is its own reference, so each of its margins is 0."""
        if start is None:
            figures = Figures(math.log(2.0), 0.0, _metrics(0.0, 0.0, 1))
            pairs = [figures.loss] * (len(found.rows) // 2)
        else:
            figures, pairs = self._figures(found.rows, -np.array(start, np.float32))
        return dataclasses.replace(
            found,
            loss=figures.loss,
            accuracy=figures.accuracy,
            metrics=figures.metrics,
            examples=pairs,
            units=[1] * len(pairs),
        )

    def state(self) -> Mapping[str, Float32Array]:
        """See `Learning`."""
        return {"reference": self._log_pi_ref}

    def close(self) -> None:
        """See `Learning`."""
        if self._start is not None:
            self._start.remove()

    def _figures(self, rows: Sequence[float], reference: Float32Array) -> tuple[Figures, list[float]]:
        """Means over pairs, and the objective of each, from the losses of their rows and log π_ref."""
        import torch
        from torch.nn.functional import logsigmoid

        chosen, rejected = rewards(self._beta, torch.tensor(rows, dtype=torch.float32), reference)
        losses = -logsigmoid(chosen - rejected)
        pairs = len(losses)
        figures = Figures(
            float(losses.double().sum()) / pairs,
            int((chosen > rejected).sum()) / pairs,
            _metrics(float(chosen.double().sum()), float(rejected.double().sum()), pairs),
        )
        return figures, losses.tolist()


def _metrics(chosen: float, rejected: float, pairs: int) -> dict[str, float]:
    """Of `DirectPreference.metrics`, from sums over pairs."""
    means = (chosen / pairs, rejected / pairs, (chosen - rejected) / pairs)
    return dict(zip(DirectPreference.metrics, means, strict=True))


METHOD = DirectPreference()
