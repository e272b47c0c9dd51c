"""Hyperparameters that work without being chosen. Free of torch.

The learning rate and epochs were chosen by held-out loss of SmolLM2-135M with rank 16 on all linear layers: on 400
rows of PubMedQA, 5e-4 takes it from 3.29 to 2.93 nats in one epoch and to 2.90 in two; later epochs memorise, which is
why the best checkpoint is kept and larger files get fewer passes.

**Few-shot.** Below `FEW_SHOT_ROWS` rows a held-out tenth is a handful of rows: it says next to nothing about when to
stop, and each of them is missing where it would be learned from. So nothing is held out. The number of steps is chosen
by cross-validation over `MAX_FOLDS` folds, whose held-out losses together cover every row once, and the adapter is then
trained on all rows for that many steps. A lower rank leaves fewer weights to memorise with, a smaller batch gives an
epoch of few rows several steps, and there are enough epochs for the turning point to lie within them. On 20 rows of the
Devil's Dictionary (base 4.680 nats) rank 8 turns after 4 epochs at 4.152 and rank 16 after 3 at 4.165; after 11 epochs
they stand at 4.60 and 5.42. It is for one file of supervised rows: the folds of several tasks would hold out other
shares of each, those of preference pairs would need a reference for each, and in a sweep they would multiply with the
trials.

What differs for a method stands in its own file (`tenora.training.methods`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenora.errors import InvalidRequestError
from tenora.training.kinds.kind import AdapterKind
from tenora.training.kinds.table import LORA_KIND
from tenora.training.methods.method import Method
from tenora.training.methods.table import USUAL
from tenora.training.settings import AUTO, RUN

FEW_SHOT_ROWS = 50
FEW_SHOT_RANK = 8
MAX_FOLDS = 5
HALVING_FACTOR = 3  # of the trials that reach a rung of a sweep one in so many goes on
LEARNING_COST = 3  # a learned token costs as much as three that are read: forward, gradients of inputs and weights
_MAX_HELD_OUT = 100  # rows; an evaluation of more costs time and moves the mean by little


@dataclass(frozen=True, slots=True)
class ResolvedHyperparameters:
    """Concrete numbers of a run. `batch_size` is in examples; `own` are the settings of the method alone."""

    n_epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_multiplier: float
    own: dict[str, Any]


def resolve_hyperparameters(
    rows: int,
    tokens: int,
    requested: Mapping[str, Any],
    *,
    method: Method = USUAL,
    kind: AdapterKind = LORA_KIND,
    few_shot: bool = False,
) -> ResolvedHyperparameters:
    """Replace "auto" and absent values by numbers that suit the training rows.

    Args:
        rows: examples to train on, without the held-out ones.
        tokens: their tokens.
        requested: the method's hyperparameters and `learning_rate`, each a number, "auto", None or absent.
            `learning_rate` is absolute; the multiplier scales the method's usual one.
        method: the one to train by.
        kind: of the adapter.
        few_shot: the recipe of `FEW_SHOT_ROWS`; see `is_few_shot`.

    Raises:
        InvalidRequestError: a value is out of bounds, or both learning rate and multiplier are given.
    """
    asked = {
        name: setting.check(value) if (value := requested.get(name)) not in (None, AUTO) else None
        for name, setting in method.asked.items()
    }
    given = requested.get("learning_rate")
    rate = None if given in (None, AUTO) else RUN["learning_rate"].check(given)
    multiplier = asked["learning_rate_multiplier"]
    if rate is not None and multiplier is not None:
        raise InvalidRequestError(
            "Give learning_rate or learning_rate_multiplier, not both.", param="learning_rate_multiplier"
        )
    usual = method.learning_rate * kind.rate
    rate = rate if rate is not None else usual * (1.0 if multiplier is None else multiplier)
    batch_size = min(asked["batch_size"] or _auto_batch_size(rows, few_shot=few_shot), max(rows, 1))
    return ResolvedHyperparameters(
        n_epochs=asked["n_epochs"] or _auto_epochs(rows, tokens, method=method, few_shot=few_shot),
        batch_size=batch_size,
        learning_rate=rate,
        learning_rate_multiplier=rate / usual,
        own=method.own_settings(asked),
    )


def is_few_shot(rows: int, *, method: Method, tasks: int, has_validation: bool, sweeps: bool) -> bool:
    """Whether a job with so many rows follows the few-shot recipe.

    Args:
        rows: of its only file.
        method: that allows folds.
        tasks: number of training files.
        has_validation: a validation file says when to stop, so that no folds are needed.
        sweeps: its trials are compared on rows that are held out.
    """
    return rows < FEW_SHOT_ROWS and method.cross_validates and tasks == 1 and not (has_validation or sweeps)


def cross_validation_folds(rows: int) -> int:
    """Into how many folds so few rows are divided: each has at least one."""
    return min(MAX_FOLDS, rows)


def halving_rungs(trials: int) -> Sequence[tuple[float, int]]:
    """Successive halving (Jamieson and Talwalkar 2016): where the trials of a sweep are compared.

    Returns:
        At each rung the share of their schedule that the trials have done, and how many go on. The last one runs to the
        end.
    """
    if trials <= 1:
        return [(1.0, trials)]
    if trials <= HALVING_FACTOR:
        return [(1 / HALVING_FACTOR, 1), (1.0, 1)]
    first = math.ceil(trials / HALVING_FACTOR)
    second = max(1, math.ceil(first / HALVING_FACTOR))
    return [(1 / 6, first), (1 / 2, second), (1.0, second)]


def held_out_fraction(rows: int) -> float:
    """The share of examples to measure on when the job brings no validation file: a tenth, at least 1, at most 100.

    A fifth of a small file: what is chosen by a couple of rows is chosen by chance.
    """
    return min(0.1 if rows >= FEW_SHOT_ROWS else 0.2, _MAX_HELD_OUT / max(rows, 1))


def _auto_epochs(rows: int, tokens: int, *, method: Method, few_shot: bool) -> int:
    """A few passes over small files, two over middling ones, one where a single pass has enough steps."""
    if few_shot:
        return 8 if rows < 16 else 6
    usual = 2 if rows <= 2000 and tokens <= 2_000_000 else 1
    return max(usual, method.small_file_epochs) if rows <= 256 else usual


def _auto_batch_size(rows: int, *, few_shot: bool) -> int:
    """8 rows, fewer for a handful so that an epoch has several steps, more for large files (steps grow as √rows)."""
    if few_shot and rows < 16:
        return 2
    if rows < 64:
        return 4
    return min(8 * 2 ** max(0, round(math.log2(rows / 1000) / 2)), 64) if rows > 1000 else 8
