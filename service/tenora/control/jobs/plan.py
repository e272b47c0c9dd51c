"""From what a job asks for and what its files hold to concrete numbers: no "auto" is left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tenora.control.jobs.apart import served_rank
from tenora.control.jobs.requests import Asked
from tenora.control.jobs.shape import Limits, ParentShape, kind_of, lora_spec
from tenora.control.jobs.sweeps import points
from tenora.training.kinds.table import LORA_KIND, find_kind
from tenora.training.recipes import (
    FEW_SHOT_RANK,
    ResolvedHyperparameters,
    cross_validation_folds,
    resolve_hyperparameters,
)
from tenora.training.settings import AUTO, PUBLISHING, ROWS, RUN, SETTINGS
from tenora.training.spec import LORA, LORA_ASKED, TRIAL, LoraSpec, TrainSpec, Trial

_OF_RUN = tuple(name for name in SETTINGS if name in RUN)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What there is to train on.

    Attributes:
        examples: of an epoch, weighted: rows, or pairs for DPO.
        tokens: of an epoch.
        few_shot: no example is held out; see `tenora.training.recipes`.
    """

    examples: int
    tokens: int
    few_shot: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """The numbers of a run.

    Attributes:
        folds: of cross-validation; 0 holds rows out.
        trials: of a sweep, each as a run by itself; empty without one.
        split_seed: draws the folds.
        spec_fields: fields of the TrainSpec: the hyperparameters among them, and others that were asked for.
    """

    hyperparameters: ResolvedHyperparameters
    lora: LoraSpec
    folds: int
    trials: tuple[Resolved, ...]
    split_seed: int
    spec_fields: Mapping[str, Any]

    @property
    def trial(self) -> Trial:
        """As one of a sweep."""
        found = {name: setting.default for name, setting in RUN.items()} | dict(self.spec_fields)
        found |= msgspec.structs.asdict(self.lora) | dataclasses.asdict(self.hyperparameters)
        return {name: found[name] for name in TRIAL}


def resolve(asked: Asked, limits: Limits, parent: ParentShape | None, counts: RowCounts, seed: int) -> Resolved:
    """Fill in everything that is "auto" or absent. Equal arguments give equal numbers.

    Args:
        parent: of the adapter to start from, if there is one.
        seed: of the job; draws the trials of a sweep.

    Raises:
        InvalidRequestError: values that do not fit the rows or the parent.
    """
    requested = {**asked.hyperparameters, "learning_rate": asked.settings.get("learning_rate")}
    chosen = resolve_hyperparameters(
        counts.examples,
        counts.tokens,
        requested,
        method=asked.learns_by,
        kind=kind_of(asked.lora),
        few_shot=counts.few_shot,
    )
    max_steps = int(asked.settings.get("max_steps", 0))
    if max_steps:
        n_epochs = _epochs_of(max_steps, counts.examples, chosen.batch_size)
        chosen = dataclasses.replace(chosen, n_epochs=n_epochs)
    drawn = points(asked.sweep, limits, seed) if asked.sweep else ()
    trials = tuple(resolve(asked.at(point), limits, parent, counts, seed) for point in drawn)
    if trials:
        lora = trials[0].lora  # where ranks are tried, the usual one may be none that can be served
    else:
        lora = lora_spec(asked.lora, limits, parent, usual_rank=_usual_rank(asked, limits, counts))
    return Resolved(
        hyperparameters=chosen,
        lora=lora,
        folds=cross_validation_folds(counts.examples) if counts.few_shot else 0,
        trials=trials,
        split_seed=asked.split_seed,
        spec_fields={name: asked.settings[name] for name in _OF_RUN if name in asked.settings}
        | {name: value for name, value in dataclasses.asdict(chosen).items() if name in RUN},
    )


def _usual_rank(asked: Asked, limits: Limits, counts: RowCounts) -> int:
    if asked.learns_by.runs_apart:
        return served_rank(limits)
    return FEW_SHOT_RANK if counts.few_shot else LoraSpec().rank


def _epochs_of(max_steps: int, examples: int, batch_size: int) -> int:
    """The passes over the rows that so many steps come to, the last one perhaps not to its end."""
    return math.ceil(max_steps / max(math.ceil(examples / batch_size), 1))


def shown_hyperparameters(asked: Asked, spec: TrainSpec, multiplier: float) -> dict[str, Any]:
    """The job's hyperparameters in numbers; what its sweep still has to choose stays "auto"."""
    values = {**msgspec.structs.asdict(spec), "learning_rate_multiplier": multiplier, **spec.method_settings}
    swept = _chosen_by_sweep(asked)
    return {name: AUTO if name in swept else values[name] for name in asked.learns_by.asked}


def shown_lora(asked: Asked, spec: TrainSpec) -> dict[str, Any]:
    """The shape in numbers, without what the job's sweep still has to choose."""
    swept = _chosen_by_sweep(asked)
    start = {name: value for name, value in asked.lora.items() if name in LORA_ASKED and name not in LORA}
    return {name: value for name, value in shown_shape(spec.lora).items() if name not in swept} | start


def shown_shape(lora: LoraSpec) -> dict[str, Any]:
    """What a shape says of the settings that its kind has, and its `type` if that is not the usual one."""
    kind = find_kind(lora.type)
    shared: dict[str, Any] = {name: value for name, value in msgspec.to_builtins(lora).items() if name in kind.shared}
    return ({} if kind is LORA_KIND else {"type": kind.name}) | shared | lora.own


def shown_settings(asked: Asked, spec: TrainSpec, max_seq_length: int) -> dict[str, Any]:
    """The job's other settings as they are used."""
    swept = _chosen_by_sweep(asked)
    return {
        **{name: getattr(spec, name) for name in _OF_RUN if name not in swept},
        **{name: asked.settings.get(name, setting.default) for name, setting in ROWS.items()},
        "max_seq_length": max_seq_length,
        **{name: asked.settings[name] for name in PUBLISHING if name in asked.settings},
    }


def _chosen_by_sweep(asked: Asked) -> set[str]:
    """Settings that the job's sweep chooses: those that it tries, and those that are made from them unless given."""
    every = {**LORA, **RUN, **asked.learns_by.asked}
    swept = set(asked.sweep or {})
    return {
        name
        for name, setting in every.items()
        if name in swept or (name not in asked.lora and setting.follows in swept)
    }


def shown_trials(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The rows of a sweep's table before it begins; the columns are `tenora.control.jobs.sweeps.TRIAL_COLUMNS`."""
    return [
        {
            "trial": number,
            **trial,
            "status": "queued",
            "step": 0,
            "total_steps": None,
            "valid_loss": None,
            "winner": False,
            "reason": None,
        }
        for number, trial in enumerate(trials)
    ]
