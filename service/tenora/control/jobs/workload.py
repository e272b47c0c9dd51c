"""What a run will do, counted from its rows: optimizer steps, and tokens that are read to learn and to measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tenora.control.jobs.plan import Resolved
from tenora.control.jobs.preparation import TaskRows
from tenora.data.dataset import TokenizedDataset
from tenora.data.division import fold
from tenora.training.events import PROBE_ROWS
from tenora.training.methods.method import Method
from tenora.training.packing import stream_length
from tenora.training.recipes import halving_rungs
from tenora.training.schedule import evaluation_steps


@dataclass(frozen=True, slots=True)
class Workload:
    """Of a whole run, over all its folds or trials; with early stopping the most that it may come to.

    Attributes:
        steps: optimizer steps.
        evaluations: times that held-out rows are measured, at the start and then on the way.
        read_tokens: that the model reads in the steps.
        measured_tokens: that it reads without learning: held-out rows and the general text at each evaluation, and what
            training rows come to under the method's reference, if it has one.
    """

    steps: int
    evaluations: int
    read_tokens: int
    measured_tokens: int


@dataclass(frozen=True, slots=True)
class _Fit:
    """One adapter from its first step to its last.

    Attributes:
        tokens: of an epoch.
    """

    steps: int
    per_epoch: int
    tokens: float

    @property
    def passes(self) -> float:
        return self.steps / self.per_epoch

    @property
    def read(self) -> float:
        return self.passes * self.tokens


def workload(found: Resolved, tasks: Sequence[TaskRows], examples: int, method: Method, *, general: int) -> Workload:
    """Count what the run of a job does.

    Args:
        found: its numbers.
        tasks: its rows.
        examples: of an epoch.
        general: tokens of the general text that the model reads; its last one is only predicted.
    """
    if method.is_frozen(method.own_settings(found.hyperparameters.own)):
        rows = [part for task in tasks for part in (task.train, task.valid) if part is not None]
        return Workload(0, 1, 0, sum(map(_tokens, rows)))
    if found.folds:
        return _folds(found, tasks[0].train, general)
    largest = max(task.source.weight for task in tasks)
    epoch = sum(task.source.weight / largest * _tokens(task.train) for task in tasks)
    held_out = sum(0 if task.valid is None else _tokens(task.valid) for task in tasks)
    if found.trials:
        return _sweep(found, examples, epoch, held_out, method, general)
    fit = _fit(found, examples, epoch)
    evaluations = 1 + _evaluations(found, fit)
    measured = evaluations * (held_out + general) + _reference(fit, method)
    return Workload(fit.steps, evaluations, round(fit.read), round(measured))


def _folds(found: Resolved, rows: TokenizedDataset, general: int) -> Workload:
    """Each fold leaves its own rows out, and is measured on them; the fit on all rows may stop before its last step."""
    final = _fit(found, rows.examples, _tokens(rows))
    fits = [final]
    for held_out in fold(rows, found.folds, seed=found.split_seed):
        kept = rows.examples - len(held_out)
        tokens = final.tokens - _tokens(rows.select(held_out))
        fits.append(_fit(found, kept, tokens))
    evaluations = 1 + _evaluations(found, final)
    probe = sum(stream_length(rows.row(row)[1]) for row in range(min(PROBE_ROWS, len(rows))))
    measured = evaluations * final.tokens + probe + 2 * general  # under the result and under the base
    return Workload(sum(fit.steps for fit in fits), evaluations, round(sum(fit.read for fit in fits)), round(measured))


def _sweep(found: Resolved, examples: int, epoch: float, held_out: int, method: Method, general: int) -> Workload:
    """Which trials go on is not known, so each rung counts so many of the average one."""
    fits = [_fit(trial, examples, epoch) for trial in found.trials]
    share = _whole_trials(len(fits)) / len(fits)
    evaluated = sum(_evaluations(trial, fit) for trial, fit in zip(found.trials, fits, strict=True))
    evaluations = 1 + math.ceil(share * evaluated)
    reference = sum(_reference(fit, method) for fit in fits)
    return Workload(
        math.ceil(share * sum(fit.steps for fit in fits)),
        evaluations,
        round(share * sum(fit.read for fit in fits)),
        round(evaluations * (held_out + general) + share * reference),
    )


def _fit(found: Resolved, examples: int, tokens: float) -> _Fit:
    chosen = found.hyperparameters
    per_epoch = math.ceil(examples / chosen.batch_size)
    return _Fit(int(found.spec_fields.get("max_steps", 0)) or chosen.n_epochs * per_epoch, per_epoch, tokens)


def _evaluations(found: Resolved, fit: _Fit) -> int:
    return len(evaluation_steps(fit.steps, int(found.spec_fields.get("eval_interval", 0)) or fit.per_epoch))


def _reference(fit: _Fit, method: Method) -> float:
    """Tokens of the training rows under the method's reference, which each row is measured under once."""
    return min(1.0, fit.passes) * fit.tokens if method.has_reference else 0.0


def _tokens(rows: TokenizedDataset) -> int:
    """That the model reads in a pass over the rows."""
    return sum(stream_length(rows.row(row)[1]) for row in range(len(rows)))


def _whole_trials(trials: int) -> float:
    """How many whole trials the work of all of them amounts to, with halving."""
    work, before, runners = 0.0, 0.0, trials
    for share, survivors in halving_rungs(trials):
        work += (share - before) * runners
        before, runners = share, survivors
    return work
