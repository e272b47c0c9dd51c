"""What a job would take, before it is created: the same checks and the same numbers, and nothing is stored."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.rows import active_version
from tenora.control.jobs.creation import find_sources, new_job
from tenora.control.jobs.forgetting_text import general_text
from tenora.control.jobs.parent import find_parent
from tenora.control.jobs.plan import Resolved, resolve
from tenora.control.jobs.preparation import Preparation, TaskRows, count_rows, preparation_of, read_tasks
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.requests import check_request
from tenora.control.jobs.rows import recent_speeds
from tenora.control.jobs.shape import Limits
from tenora.control.jobs.workload import workload
from tenora.control.registry.database import Database, Session
from tenora.control.storage.directory import Storage
from tenora.control.tenancy.records import Principal
from tenora.control.tokenizing.threads import Tokenizing
from tenora.data.duplicates import DuplicatePair
from tenora.training.recipes import LEARNING_COST
from tenora.training.settings import AUTO, ESTIMATED, RUN

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

_RECENT_STEPS = 200


@dataclass(frozen=True, slots=True)
class NearDuplicatePair:
    """Lines of a held-out row and of the training row that it nearly is, which is of the task `train_task`."""

    train_line: int
    held_out_line: int
    similarity: float
    train_task: str


@dataclass(frozen=True, slots=True)
class TaskEstimate:
    """What one training file holds, as `Estimate` has it for all."""

    name: str
    file: str
    weight: float
    rows: int
    held_out_rows: int
    tokens: int
    near_duplicates: int
    near_duplicate_pairs: Sequence[NearDuplicatePair]


@dataclass(frozen=True, slots=True)
class Replaces:
    """A version that a name means."""

    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would take.

    Attributes:
        rows, held_out_rows: examples (rows, or pairs for DPO) to train and to measure on.
        tokens, trained_tokens: of the rows to train on, once; the latter those that are learned.
        truncated: rows that would be cut.
        left_out: pairs that would not be taken, because their two answers are equal as the model sees them.
        near_duplicates: held-out examples that training all but shows.
        settings: those of `tenora.training.settings.ESTIMATED` as they would be; "auto" if a sweep chooses, None where
            the job would have none.
        folds: of cross-validation for few rows; 0 holds rows out.
        trials: of a sweep; 0 without one.
        steps, evaluations, read_tokens, measured_tokens: of the run, as
            `tenora.control.jobs.workload.Workload` has them.
        tokens_per_second: what a job reads on this service, the median of the latest steps of all jobs; None before the
            first one.
        seconds: `read_tokens` at that speed and `measured_tokens` at three times it, without waiting for a turn; None
            without a speed.
        replaces: what its name means now, which the result would be held against; None if that is nothing.
    """

    rows: int
    held_out_rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    left_out: int
    near_duplicates: int
    settings: Mapping[str, Any]
    folds: int
    trials: int
    steps: int
    evaluations: int
    read_tokens: int
    measured_tokens: int
    tokens_per_second: float | None
    seconds: float | None
    replaces: Replaces | None
    tasks: Sequence[TaskEstimate]

    @property
    def measured(self) -> bool:
        """Whether a speed was measured, so that there is a time."""
        return self.tokens_per_second is not None


class Estimates:
    """Estimates of fine-tuning jobs."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        blobs: Blobs,
        tokenizing: Tokenizing,
        limits: Callable[[], Limits],
    ) -> None:
        self._database = database
        self._storage = storage
        self._blobs = blobs
        self._tokenizing = tokenizing
        self._limits = limits

    async def estimate(self, principal: Principal, request: JobRequest) -> Estimate:
        """Read the files of a job as it would be prepared.

        Raises:
            InvalidRequestError, NotFoundError, ModelNotFoundError: as `tenora.control.jobs.jobs.Jobs.create`.
            DatasetError: rows that cannot be used, on which the job would fail.
        """
        limits = self._limits()
        asked = check_request(request, limits)
        async with self._database.read() as session:
            parent = await find_parent(session, principal, asked, limits, self._blobs)
            sources = await find_sources(session, principal.tenant_id, request)
            speed = await _recent_speed(session)
            row = new_job(principal.tenant_id, request, asked, limits, sources, parent)
            now = await active_version(session, principal.tenant_id, row.name)
        replaces = None if now is None else Replaces(row.name, now[1].version, now[1].digest)
        job = await preparation_of(self._storage, self._blobs, row)
        return await self._tokenizing.file(
            principal.tenant_id, lambda tokenizer: _estimate(job, tokenizer, limits, speed, replaces)
        )


async def _recent_speed(session: Session) -> float | None:
    """Tokens that a job reads in a second: the median of the latest steps, whichever tenant's; None without any."""
    found = await recent_speeds(session, _RECENT_STEPS)
    return statistics.median(found) if found else None


def _estimate(
    job: Preparation, tokenizer: Tokenizer, limits: Limits, speed: float | None, replaces: Replaces | None
) -> Estimate:
    tasks = read_tasks(job, tokenizer, limits)
    counts = count_rows(tasks)
    found = resolve(job.asked, limits, job.parent, counts, job.seed)
    text = general_text(tokenizer, limits.max_model_len)
    work = workload(found, tasks, counts.examples, job.asked.learns_by, general=max(len(text) - 1, 0))
    return Estimate(
        rows=sum(task.train.examples for task in tasks),
        held_out_rows=sum(_held_out(task) for task in tasks),
        tokens=sum(task.train.num_tokens for task in tasks),
        trained_tokens=sum(task.train.num_trained for task in tasks),
        truncated=sum(task.truncated for task in tasks),
        left_out=sum(task.left_out for task in tasks),
        near_duplicates=sum(task.near_duplicates.count for task in tasks),
        settings=_settled(job, found),
        folds=found.folds,
        trials=len(found.trials),
        steps=work.steps,
        evaluations=work.evaluations,
        read_tokens=work.read_tokens,
        measured_tokens=work.measured_tokens,
        tokens_per_second=speed,
        seconds=None if speed is None else (work.read_tokens + work.measured_tokens / LEARNING_COST) / speed,
        replaces=replaces,
        tasks=[
            TaskEstimate(
                name=task.source.name,
                file=task.source.file,
                weight=task.source.weight,
                rows=task.train.examples,
                held_out_rows=_held_out(task),
                tokens=task.train.num_tokens,
                near_duplicates=task.near_duplicates.count,
                near_duplicate_pairs=[_named(pair, tasks) for pair in task.near_duplicates.pairs],
            )
            for task in tasks
        ],
    )


def _settled(job: Preparation, found: Resolved) -> dict[str, Any]:
    """The settings of `ESTIMATED`, in numbers where they are known."""
    swept = job.asked.sweep or {}
    of_run = {
        name: AUTO if name in swept else getattr(found.hyperparameters, name) for name in ESTIMATED if name in RUN
    }
    return {name: of_run.get(name, job.asked.settings.get(name)) for name in ESTIMATED}


def _named(pair: DuplicatePair, tasks: Sequence[TaskRows]) -> NearDuplicatePair:
    task = tasks[pair.train_part].source.name
    return NearDuplicatePair(pair.train_line, pair.held_out_line, pair.similarity, task)


def _held_out(task: TaskRows) -> int:
    return 0 if task.valid is None else task.valid.examples
