"""What an adapter was made of: base, files, rows and settings, enough to train it again."""

from __future__ import annotations

from importlib import metadata
from typing import Any, Literal

import msgspec

from tenora.control.jobs.plan import shown_shape
from tenora.control.jobs.requests import Asked
from tenora.control.registry.ids import unix_now
from tenora.control.registry.tables import JobRow
from tenora.model.provenance import BaseSource
from tenora.training.events import FinishedEvent
from tenora.training.methods.table import find_method
from tenora.training.settings import PUBLISHING, ROWS, RUN
from tenora.training.spec import TrainSpec, trial_of

_PACKAGES = ("tenora", "torch", "transformers")
_OF_SPEC = ("method", "lora", *RUN, "folds")


class TrainingFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that went into an adapter. `sha256` is None if it was deleted before the run began."""

    id: str
    purpose: Literal["training", "validation"]
    sha256: str | None


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter that training started from."""

    name: str
    digest: str


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """What the files held, in examples: rows, or pairs of preference rows.

    Attributes:
        trained, held_out: to learn and to measure on; with cross-validation none is held out.
        cut: that were cut to `max_seq_length` tokens, which only `truncate` allows.
        split_seed: that drew the held-out ones; None if they came in a file, or none is held out.
    """

    trained: int
    held_out: int
    cut: int
    max_seq_length: int | None
    truncate: bool
    split_seed: int | None


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where an adapter comes from. Times are Unix seconds. `base` and `rows` are None in cards of older versions."""

    job_id: str
    base_model: str
    base: BaseSource | None
    parent: Parent | None
    files: list[TrainingFile]
    rows: Rows | None
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    created_at: int
    finished_at: int


def lineage_of(
    row: JobRow,
    spec: TrainSpec,
    event: FinishedEvent,
    *,
    files: list[TrainingFile],
    rows: Rows | None,
    base: BaseSource | None,
) -> Lineage:
    """Of a job's result."""
    return Lineage(
        job_id=row.id,
        base_model=spec.base_model,
        base=base,
        parent=None if row.parent is None else Parent(name=row.parent, digest=row.parent_digest or ""),
        files=files,
        rows=rows,
        settings=settings_of(spec, event.trial) | _of_job(row),
        seed=spec.seed,
        versions={name: metadata.version(name) for name in _PACKAGES},
        created_at=row.created_at,
        finished_at=unix_now(),
    )


def settings_of(spec: TrainSpec, trial: int | None) -> dict[str, Any]:
    """The resolved settings of a run; of a sweep those of the winner."""
    if trial is not None:
        spec = trial_of(spec, trial)
    values: dict[str, Any] = msgspec.to_builtins(spec)
    values["lora"] = shown_shape(spec.lora)
    return {name: values[name] for name in _OF_SPEC} | find_method(spec.method).own_settings(spec.method_settings)


def _of_job(row: JobRow) -> dict[str, Any]:
    """Settings that are none of the run's: how its rows were made, and what is asked of its name."""
    asked = Asked.stored(row.requested).settings
    of_rows = {name: row.settings[name] for name in ROWS if name in row.settings}
    return of_rows | {name: asked[name] for name in PUBLISHING if name in asked}
