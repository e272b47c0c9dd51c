"""From training files to a resolved run: tokenized, split, no "auto" left. Runs in a worker thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tenora.control.job_requests import Limits, lora_spec
from tenora.control.schema import JobRow
from tenora.control.storage import full_disk, remove
from tenora.errors import DatasetError
from tenora.training.dataset import TokenizedDataset, tokenize_file
from tenora.training.recipes import held_out_fraction, resolve_hyperparameters
from tenora.training.spec import TrainSpec

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

TRAIN_NAME = "train.npz"
VALID_NAME = "valid.npz"


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a job needs to be prepared, taken from its row so that a thread needs no session."""

    job_id: str
    tenant_id: str
    training_path: Path
    validation_path: Path | None
    workdir: Path
    hyperparameters: Mapping[str, Any]
    lora: Mapping[str, Any]
    training: Mapping[str, Any]
    seed: int

    @classmethod
    def of(cls, row: JobRow, *, training_path: Path, validation_path: Path | None, workdir: Path) -> Preparation:
        """The preparation of a job whose files and work directory lie at these paths."""
        return cls(
            job_id=row.id,
            tenant_id=row.tenant_id,
            training_path=training_path,
            validation_path=validation_path,
            workdir=workdir,
            hyperparameters=dict(row.hyperparameters),
            lora=dict(row.lora),
            training=dict(row.training),
            seed=row.seed,
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """The outcome: `plan` is a TrainSpec without paths, as JSON; `hyperparameters` has numbers where "auto" stood."""

    plan: dict[str, Any]
    hyperparameters: dict[str, Any]
    train_rows: int
    valid_rows: int
    truncated: int


def prepare(job: Preparation, tokenizer: Tokenizer, limits: Limits, *, tokens_per_microbatch: int) -> Prepared:
    """Tokenize the files into the work directory and resolve the run. Repeating it gives the same.

    Raises:
        DatasetError: rows that cannot be used, with their lines; `param` is the file at fault.
        InvalidRequestError: values that do not fit these rows.
        StorageFullError: the disk is full.
    """
    train, valid, truncated = _read(job, tokenizer, limits)
    chosen = resolve_hyperparameters(
        len(train), train.num_tokens, {**job.hyperparameters, "learning_rate": job.training.get("learning_rate")}
    )
    with full_disk():
        remove(job.workdir)
        job.workdir.mkdir(mode=0o700, parents=True)
        train.save(job.workdir / TRAIN_NAME)
        valid.save(job.workdir / VALID_NAME)
    optional = ("scheduler", "warmup_ratio", "weight_decay", "max_grad_norm", "eval_interval", "max_steps")
    plan = TrainSpec(
        run_id=job.job_id,
        group=job.tenant_id,
        train_path="",
        valid_path="",
        workdir="",
        base_model=limits.base_id,
        lora=lora_spec(job.lora, limits),
        n_epochs=chosen.n_epochs,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        tokens_per_microbatch=tokens_per_microbatch,
        seed=job.seed,
        **{name: job.training[name] for name in optional if job.training.get(name) is not None},
    )
    return Prepared(
        plan=msgspec.to_builtins(plan),
        hyperparameters={
            "n_epochs": chosen.n_epochs,
            "batch_size": chosen.batch_size,
            "learning_rate_multiplier": chosen.learning_rate_multiplier,
        },
        train_rows=len(train),
        valid_rows=len(valid),
        truncated=truncated,
    )


def is_prepared(workdir: Path) -> bool:
    """Whether both tokenized files are there."""
    return (workdir / TRAIN_NAME).is_file() and (workdir / VALID_NAME).is_file()


def spec_of(plan: Mapping[str, Any], workdir: Path) -> TrainSpec:
    """The run of a stored plan in this work directory (the state directory may have moved since)."""
    return msgspec.convert(
        {
            **plan,
            "train_path": str(workdir / TRAIN_NAME),
            "valid_path": str(workdir / VALID_NAME),
            "workdir": str(workdir),
        },
        TrainSpec,
    )


def _read(job: Preparation, tokenizer: Tokenizer, limits: Limits) -> tuple[TokenizedDataset, TokenizedDataset, int]:
    """Rows to train on, rows to measure on, and how many were cut to fit."""
    length = job.training.get("max_seq_length") or limits.max_model_len
    truncate = bool(job.training.get("truncate"))
    rows = tokenize_file(job.training_path, tokenizer, max_length=length, truncate=truncate)
    if job.validation_path is None:
        train, valid = rows.split(held_out_fraction(len(rows)), job.seed)
        return train, valid, rows.truncated
    try:
        valid = tokenize_file(job.validation_path, tokenizer, max_length=length, truncate=truncate)
    except DatasetError as error:
        raise DatasetError(
            error.message.replace("training file", "validation file"), param="validation_file"
        ) from error
    return rows, valid, rows.truncated + valid.truncated
