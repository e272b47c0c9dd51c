"""From training files to a resolved run: tokenized, split, no "auto" left. Runs in a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tenora.control.adapters.blobs import Blobs
from tenora.control.jobs.forgetting_text import general_text
from tenora.control.jobs.invocation import with_invocation
from tenora.control.jobs.parent import parent_shape
from tenora.control.jobs.plan import (
    Resolved,
    RowCounts,
    resolve,
    shown_hyperparameters,
    shown_lora,
    shown_settings,
    shown_trials,
)
from tenora.control.jobs.requests import Asked
from tenora.control.jobs.shape import Limits, ParentShape, virtual_tokens
from tenora.control.jobs.sources import Source, sources_of
from tenora.control.registry.tables import JobRow
from tenora.control.storage.directory import Storage, full_disk, remove
from tenora.data.dataset import OtherRowsError, TokenizedDataset, tokenize_file
from tenora.data.division import divide
from tenora.data.duplicates import NearDuplicates, near_duplicates, nothing_ends_it
from tenora.errors import DatasetError
from tenora.training.methods.table import find_method, wrong_rows
from tenora.training.recipes import held_out_fraction, is_few_shot
from tenora.training.spec import TaskSpec, TrainSpec

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a job needs to be prepared, taken from its row so that a thread needs no session.

    Attributes:
        sources: the training files, with the paths of their bytes beside them in `paths`.
        validation_path: None holds rows of each source out, or none at all (few-shot).
        parent: shape of the adapter to start from, if there is one.
    """

    job_id: str
    tenant_id: str
    workdir: str
    sources: Sequence[Source]
    paths: Sequence[str]
    validation_path: str | None
    asked: Asked
    parent: ParentShape | None
    seed: int


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The tokenized rows of a source.

    Attributes:
        valid: None if no rows are held out.
        truncated: rows that were cut to fit.
        left_out: pairs whose answers are equal as the model sees them.
        near_duplicates: held-out examples that training all but shows.
    """

    source: Source
    train: TokenizedDataset
    valid: TokenizedDataset | None
    truncated: int
    left_out: int = 0
    near_duplicates: NearDuplicates = field(default=NearDuplicates())


@dataclass(frozen=True, slots=True)
class Prepared:
    """The outcome.

    Attributes:
        plan: a TrainSpec whose paths are relative to the work directory, as JSON.
        hyperparameters, lora, settings: of the job, with numbers where "auto" stood.
        sweep_results: the table of a sweep before it begins; None without one.
        tasks: what each source holds.
        folds: of cross-validation; 0 if rows are held out.
    """

    plan: dict[str, Any]
    hyperparameters: dict[str, Any]
    lora: dict[str, Any]
    settings: dict[str, Any]
    sweep_results: list[dict[str, Any]] | None
    tasks: Sequence[TaskRows]
    folds: int


def prepare(job: Preparation, tokenizer: Tokenizer, limits: Limits, *, tokens_per_microbatch: int) -> Prepared:
    """Tokenize the files into the work directory and resolve the run. Repeating it gives the same.

    Raises:
        DatasetError: rows that cannot be used, with their lines; `param` is the file at fault.
        InvalidRequestError: values that do not fit these rows, or the adapter to start from.
        StorageFullError: the disk is full.
    """
    tasks = read_tasks(job, tokenizer, limits)
    counts = count_rows(tasks)
    found = resolve(job.asked, limits, job.parent, counts, job.seed)
    text = general_text(tokenizer, limits.max_model_len)
    found = replace(found, lora=with_invocation(found.lora, tokenizer, [task.train for task in tasks]))
    spec = _plan(job, tasks, found, limits.base_id, tokens_per_microbatch, text)
    workdir = Path(job.workdir)
    with full_disk():
        remove(workdir)
        workdir.mkdir(mode=0o700, parents=True)
        for task, stored in zip(tasks, spec.tasks, strict=True):
            task.train.save(workdir / stored.train_path)
            if task.valid is not None:
                task.valid.save(workdir / stored.valid_path)
    return Prepared(
        plan=msgspec.to_builtins(spec),
        hyperparameters=shown_hyperparameters(job.asked, spec, found.hyperparameters.learning_rate_multiplier),
        lora=shown_lora(job.asked, spec),
        settings=shown_settings(job.asked, spec, _max_length(job, limits)),
        sweep_results=shown_trials(spec.trials) or None,
        tasks=tasks,
        folds=spec.folds,
    )


def read_tasks(job: Preparation, tokenizer: Tokenizer, limits: Limits) -> Sequence[TaskRows]:
    """Tokenize every source and divide its rows; raises as `prepare` does."""
    check = tokenizer.check or nothing_ends_it  # of whoever waits for all of this
    valid = None
    if job.validation_path is not None:
        valid = _tokenize(job, job.validation_path, "validation_file", "validation file", tokenizer, limits)
    files = [
        _tokenize(job, path, source.param, "training file", tokenizer, limits)
        for source, path in zip(job.sources, job.paths, strict=True)
    ]
    files, valid = job.asked.learns_by.settle(job.asked.method_settings, files, valid)
    if valid is not None:
        (source,), (rows,) = job.sources, files
        truncated, left_out = rows.truncated + valid.truncated, rows.left_out + valid.left_out
        return [TaskRows(source, rows, valid, truncated, left_out, near_duplicates(rows, held_out=valid, check=check))]
    few_shot = is_few_shot(
        files[0].examples,
        method=job.asked.learns_by,
        tasks=len(files),
        has_validation=False,
        sweeps=job.asked.sweep is not None,
    )
    if few_shot:
        return [TaskRows(job.sources[0], files[0], None, files[0].truncated)]
    divided = divide(
        files, [held_out_fraction(rows.examples) for rows in files], seed=job.asked.split_seed, check=check
    )
    trained = [train for train, _ in divided]
    return [
        TaskRows(
            source,
            train,
            held_out,
            rows.truncated,
            rows.left_out,
            near_duplicates(*trained, held_out=held_out, check=check),
        )
        for source, rows, (train, held_out) in zip(job.sources, files, divided, strict=True)
    ]


def count_rows(tasks: Sequence[TaskRows]) -> RowCounts:
    """What an epoch sees: of each task a share by its weight, as `tenora.training.spec.TaskSpec` says."""
    largest = max(task.source.weight for task in tasks)
    shares = [task.source.weight / largest for task in tasks]
    return RowCounts(
        examples=sum(max(1, round(share * task.train.examples)) for share, task in zip(shares, tasks, strict=True)),
        tokens=sum(round(share * task.train.num_tokens) for share, task in zip(shares, tasks, strict=True)),
        few_shot=tasks[0].valid is None,
    )


def is_prepared(plan: Mapping[str, Any], workdir: str) -> bool:
    """Whether all tokenized files of a stored plan are there."""
    paths = [path for task in plan["tasks"] for path in (task["train_path"], task["valid_path"]) if path]
    return all(Path(workdir, path).is_file() for path in paths)


def spec_of(plan: Mapping[str, Any], workdir: str, parent: str | None) -> TrainSpec:
    """The run of a stored plan in this work directory (the state directory may have moved since).

    Args:
        parent: path of the PEFT directory of the adapter to start from.
    """
    spec = msgspec.convert(plan, TrainSpec)
    # Older releases kept the method's own settings among the others.
    older = {one.name: plan[one.name] for one in find_method(spec.method).settings if one.name in plan}
    spec = msgspec.structs.replace(spec, method_settings=older | spec.method_settings)
    tasks = tuple(
        msgspec.structs.replace(
            task,
            train_path=str(Path(workdir, task.train_path)),
            valid_path=str(Path(workdir, task.valid_path)) if task.valid_path else "",
        )
        for task in spec.tasks
    )
    return msgspec.structs.replace(spec, tasks=tasks, workdir=workdir, init_path=parent or "", acknowledged=True)


def _plan(
    job: Preparation,
    tasks: Sequence[TaskRows],
    found: Resolved,
    base_id: str,
    tokens_per_microbatch: int,
    text: tuple[int, ...],
) -> TrainSpec:
    return TrainSpec(
        run_id=job.job_id,
        share_group=job.tenant_id,
        tasks=tuple(
            TaskSpec(
                name=task.source.name,
                train_path=f"train-{number}.npz",
                valid_path="" if task.valid is None else f"valid-{number}.npz",
                weight=task.source.weight,
            )
            for number, task in enumerate(tasks)
        ),
        workdir="",
        base_model=base_id,
        method=job.asked.method,
        method_settings=found.hyperparameters.own,
        lora=msgspec.structs.replace(
            found.lora, last_layers=job.asked.learns_by.last_layers(job.asked.method_settings)
        ),
        folds=found.folds,
        trials=tuple(trial.trial for trial in found.trials),
        tokens_per_microbatch=tokens_per_microbatch,
        seed=job.seed,
        split_seed=job.asked.split_seed,
        general_text=() if job.asked.learns_by.has_head else text,
        **found.spec_fields,
    )


def _max_length(job: Preparation, limits: Limits) -> int:
    length: int = job.asked.settings.get("max_seq_length") or limits.max_model_len
    return min(length, limits.max_model_len - virtual_tokens(job.asked.lora))


def _tokenize(
    job: Preparation, path: str, param: str, what: str, tokenizer: Tokenizer, limits: Limits
) -> TokenizedDataset:
    """Read one file; an error names it by its place in the request."""
    try:
        rows = tokenize_file(
            Path(path),
            tokenizer,
            max_length=_max_length(job, limits),
            truncate=bool(job.asked.settings.get("truncate")),
            kind=job.asked.rows,
        )
    except DatasetError as error:
        message = error.message
        if isinstance(error, OtherRowsError):
            message = wrong_rows(job.asked.learns_by, job.asked.rows, error.found)
        message = message.replace("training file", what)
        if len(job.sources) > 1:
            message = f"{param}: {message}"
        raise DatasetError(message, param=param) from error
    return rows


async def preparation_of(storage: Storage, blobs: Blobs, row: JobRow) -> Preparation:
    """What is needed to prepare a job, which need not be stored."""
    sources = sources_of(row.training_file, row.training_files)

    def local(file_id: str) -> str:
        return storage.objects.local(row.tenant_id, file_id)

    return Preparation(
        job_id=row.id,
        tenant_id=row.tenant_id,
        workdir=str(storage.workdir(row.tenant_id, row.id)),
        sources=sources,
        paths=[await asyncio.to_thread(local, source.file) for source in sources],
        validation_path=None if row.validation_file is None else await asyncio.to_thread(local, row.validation_file),
        asked=Asked.stored(row.requested),
        parent=None if row.parent_digest is None else await parent_shape(blobs, row.parent_digest),
        seed=row.seed,
    )
