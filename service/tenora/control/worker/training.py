"""`queued` → `running` → published: one job is followed through the engine, over engine deaths if need be."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenora.aclosing import aclosing
from tenora.adapters.digest import damaged
from tenora.control.gate.baselines import Measuring, measuring
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, LeaseLostError, drop_lease, owned, read_owned
from tenora.control.jobs.preparation import is_prepared, spec_of
from tenora.control.jobs.rows import PAUSED_LINE, PausedError, finite, log, recent_metrics, thin_steps
from tenora.control.registry.database import RegistryBusyError
from tenora.control.worker.batches import batches
from tenora.control.worker.checkpoints import keep_checkpoint
from tenora.control.worker.eta import Eta
from tenora.control.worker.log import Metrics, eval_line, fold_line, progress_line, step_line, trial_line
from tenora.control.worker.publication import publish_result
from tenora.control.worker.sweep_table import choose_winner, record_trial, shares_done
from tenora.engine.apart import Trainer
from tenora.errors import StorageFullError, TenoraError, TrainingError, UnavailableError
from tenora.training.events import (
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    FoldEvent,
    ProgressEvent,
    Recorded,
    RetoldEvent,
    StepEvent,
    StoppedEvent,
    TrainEvent,
    TrialEvent,
)
from tenora.training.spec import TrainSpec

_log = logging.getLogger(__name__)

BUSY_SECONDS = 1.0  # between attempts to write to a busy registry, each of which waits for a while itself
BATCH_SECONDS = 1.0  # that a line of the log may wait for others, to be written with them
MAX_ATTEMPTS = 5  # runs of one job that may end with the engine


@dataclass(frozen=True, slots=True)
class Told:
    """An event of a run as it came.

    Attributes:
        left: seconds that the run would take from then on, if that was known.
        total_steps: of the run, as it had last said; 0 before that.
        again: it was said before the run was resumed, and may have been recorded then.
        at: when it came (Unix time).
    """

    event: TrainEvent
    left: float | None
    total_steps: int
    again: bool = False
    at: float = field(default_factory=time.time)

    def is_line(self) -> bool:
        """Whether it is no more than a line of the log, which may wait for others."""
        return isinstance(self.event, StepEvent | EvalEvent | TrialEvent | FoldEvent | ProgressEvent)


class JobTraining:
    """Follows one claimed job until it is published, has failed, or is not this worker's any more."""

    def __init__(self, context: JobContext, claim: Claim, closing_down: asyncio.Event) -> None:
        """Take the job; nothing happens before `run`.

        Args:
            context: the collaborators.
            claim: the lease, whose token fences every write.
            closing_down: set when the service stops; the run is then paused and the job left for the next start.
        """
        self._context = context
        self._claim = claim
        self._closing = closing_down
        self._pausing = asyncio.Event()  # the job is paused: its run is to end, and all that it says until then counts
        self._trainer: Trainer = context.apart if claim.runs_apart else context.engine
        self._left = asyncio.Event()  # the job is in other hands: what the run still says is not recorded
        self._before: dict[int, float] = {}  # how far the trials of its sweep were when it began
        self._lost: LeaseLostError | None = None

    async def run(self) -> None:
        """Do it; errors of the job itself end the job, anything else is raised.

        Raises:
            LeaseLostError: the job changed hands; nothing of it is recorded here any more, and its run has ended.
            RegistryBusyError: the job's status could not be read or written; it is as the registry says.
        """
        try:
            spec = await self._spec()
            while spec is not None and await self._engine_is_up():
                await self._begin()
                if self._pausing.is_set() or await self._attempt(spec):
                    break
        except (LeaseLostError, RegistryBusyError):
            raise
        except TenoraError as error:
            await self._context.fail(self._claim, error)
        if self._lost is not None:
            raise self._lost
        if self._pausing.is_set():
            await self._let_go()

    async def leave(self) -> None:
        """The job was cancelled by its owner: record nothing more, end the run."""
        self._left.set()
        await self._trainer.stop_training(self._claim.job_id, pause=False)

    async def pause(self) -> None:
        """The job was paused by its owner: end the run, and record what it says until it has."""
        self._pausing.set()
        await self.halt()

    async def halt(self) -> None:
        """End the run so that it can go on."""
        await self._trainer.stop_training(self._claim.job_id, pause=True)

    async def _let_go(self) -> None:
        async with self._context.database.write() as session:
            row = await owned(session, self._claim)
            drop_lease(row)
            if row.status == "paused":
                log(session, row, PAUSED_LINE)

    async def _spec(self) -> TrainSpec | None:
        """The run; None if its rows have to be read again, which puts the job back into that state."""
        context = self._context
        async with context.database.read() as session:
            row = await read_owned(session, self._claim)
        workdir = str(context.storage.workdir(row.tenant_id, row.id))
        if row.plan is not None and await asyncio.to_thread(is_prepared, row.plan, workdir):
            parent = None if row.parent_digest is None else context.blobs.ref(row.parent_digest).path
            if row.parent_digest is not None and not await asyncio.to_thread(
                context.blobs.store.verify, row.parent_digest
            ):
                raise damaged(row.parent_digest)
            return spec_of(row.plan, workdir, parent)
        async with context.database.write() as session:
            row = await owned(session, self._claim)
            if row.status == "paused":
                self._pausing.set()
                return None
            row.status = "validating_files"
            row.plan = None
            drop_lease(row)
            log(session, row, "The prepared rows are missing; the files are read again", level="warn")
        return None

    async def _engine_is_up(self) -> bool:
        """Wait for the engine; False if the service stops or the job changed hands first."""
        waits = [
            asyncio.ensure_future(wait)
            for wait in (
                self._context.engine.wait_alive(),
                self._closing.wait(),
                self._pausing.wait(),
                self._left.wait(),
            )
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._is_to_end()

    def _is_to_end(self) -> bool:
        return self._closing.is_set() or self._pausing.is_set() or self._left.is_set()

    async def _begin(self) -> None:
        async with self._context.database.write() as session:
            row = await owned(session, self._claim)
            if row.status == "paused":
                self._pausing.set()
                return
            resumed = row.status == "running" or row.trained_tokens is not None
            row.status = "running"
            self._before = shares_done(row)
            log(
                session,
                row,
                "Fine-tuning job resumed from its last saved state" if resumed else "Fine-tuning job started",
            )

    async def _attempt(self, spec: TrainSpec) -> bool:
        """Follow the run; False if the engine died and it should be tried again."""
        eta = Eta(spec, self._before)
        try:
            async with (
                measuring(self._context, self._claim, spec) as base,
                aclosing(self._trainer.train(spec)) as events,
                aclosing(batches(self._told(events, eta), Told.is_line, BATCH_SECONDS)) as told,
            ):
                complete = True  # nothing is recorded behind a gap: whoever resumes the run hears all of that again
                async for batch in told:
                    complete = complete and await self._record(batch, spec, base)
                    if complete and isinstance(batch[0].event, Recorded):
                        await self._trainer.acknowledge(spec.run_id, len(batch))
        except UnavailableError as error:
            if self._is_to_end():
                return True
            await self._died(error)
            return False
        return True

    @staticmethod
    async def _told(events: AsyncIterator[TrainEvent], eta: Eta) -> AsyncIterator[Told]:
        async for event in events:
            if isinstance(event, RetoldEvent):
                for earlier in event.events:
                    eta.recall(earlier)
                    yield Told(earlier, None, eta.total_steps, again=True)
            else:
                left = eta.left(event)
                yield Told(event, left, eta.total_steps)

    async def _record(self, batch: Sequence[Told], spec: TrainSpec, base: Measuring) -> bool:
        """Put events of the run into the registry, unless the job is in other hands; whether they are there.

        A busy registry is no matter of the engine's: the run goes on, and its events wait until they can be recorded.
        """
        while not self._left.is_set():
            try:
                await self._write(batch, spec, base)
            except LeaseLostError as error:
                # Cancelled elsewhere, or claimed by a worker that thought us dead. The run's end is awaited,
                # so that its state is whole when another run of this job begins.
                self._lost = error
                self._left.set()
                await self.halt()
                return False
            except RegistryBusyError as error:
                if self._closing.is_set():
                    return False  # it is not acknowledged, and said again at the next start
                _log.warning("job %s: %s Its run goes on.", self._claim.job_id, error.message)
                await asyncio.sleep(BUSY_SECONDS)
            else:
                return True
        return False

    async def _write(self, batch: Sequence[Told], spec: TrainSpec, base: Measuring) -> None:
        if batch[0].is_line():
            await self._lines(batch, spec)
            return
        match batch[0].event:
            case CheckpointEvent() as event:
                await self._keep(event)
            case FinishedEvent() as event:
                await self._finish(event, spec, base)
            case FailedEvent() as event:
                raise TrainingError(event.message, code=event.code)
            case StoppedEvent() as event:
                await self._stopped(event)

    async def _lines(self, batch: Sequence[Told], spec: TrainSpec) -> None:
        """Append the lines of events to the job's log, all of them or none."""
        async with self._context.database.write(alone=False) as session:
            row = await owned(session, self._claim)
            latest = await recent_metrics(session, row, 2 * len(batch) + 1000) if batch[0].again else []
            known = {_numbers(line) for line in latest}
            for told in batch:
                event = told.event
                message, metrics = _line(told, spec)
                if told.again and _numbers(metrics) in known:
                    continue
                if isinstance(event, StepEvent | TrialEvent | FoldEvent):
                    row.trained_tokens = event.trained_tokens
                if isinstance(event, TrialEvent):
                    record_trial(row, event)
                if told.left is not None:
                    row.estimated_finish = math.ceil(told.at + told.left)
                log(session, row, message, metrics=metrics)
                await session.flush()  # keeps the order of the lines
            steps = [told.event for told in batch if isinstance(told.event, StepEvent)]
            if steps:
                await thin_steps(session, row, steps[0].step, steps[-1].step, steps[-1].total_steps)
            paused = row.status == "paused"
        if paused and not self._pausing.is_set():  # by another process, whose runner does not have it
            await self.pause()

    async def _finish(self, event: FinishedEvent, spec: TrainSpec, base: Measuring) -> None:
        try:
            await self._choose(event)
            await publish_result(self._context, self._claim, spec, event, base)
        except PausedError:
            self._pausing.set()

    async def _choose(self, event: FinishedEvent) -> None:
        """Of a sweep: the winner's settings are the job's from now on."""
        if event.trial is not None:
            async with self._context.database.write() as session:
                choose_winner(await owned(session, self._claim), event.trial)

    async def _keep(self, event: CheckpointEvent) -> None:
        if self._claim.runs_apart:
            return  # weights of a base are nothing that the engine calls
        try:
            await keep_checkpoint(self._context, self._claim, event)
        except StorageFullError:
            # The run goes on: its own state is on disk already, a callable checkpoint is an extra.
            _log.warning("job %s: no room for the checkpoint of step %d", self._claim.job_id, event.step)

    async def _stopped(self, event: StoppedEvent) -> None:
        if self._closing.is_set() or self._pausing.is_set():
            return  # the job stays as it is; the next start, or its owner, goes on
        if event.paused:
            raise UnavailableError("The engine is shutting down.")
        raise TrainingError(f"The run was stopped at step {event.step}; start the job again.", code="run_stopped")

    async def _died(self, error: UnavailableError) -> None:
        """The engine, or the process that the run has to itself, is gone."""
        what = "training process" if self._claim.runs_apart and self._context.engine.alive else "engine"
        async with self._context.database.write() as session:
            row = await owned(session, self._claim)
            row.attempts += 1
            row.estimated_finish = None
            attempts = row.attempts
            log(
                session,
                row,
                f"The {what} stopped; the job goes on from its last saved state when it is back "
                f"(attempt {attempts} of {MAX_ATTEMPTS})",
                level="warn",
            )
        _log.warning("job %s: %s", self._claim.job_id, error.message)
        if attempts >= MAX_ATTEMPTS:
            raise TrainingError(
                f"The {what} stopped {attempts} times while this job ran; try a smaller batch_size or max_seq_length.",
                code="engine_lost",
            )


def _line(told: Told, spec: TrainSpec) -> tuple[str, Metrics]:
    """Message and numbers of an event that is a line of the log."""
    match told.event:
        case StepEvent() as event:
            return step_line(event)
        case EvalEvent() as event:
            return eval_line(event, told.total_steps)
        case TrialEvent() as event:
            return trial_line(event, len(spec.trials))
        case FoldEvent() as event:
            return fold_line(event, spec.folds)
        case ProgressEvent() as event:
            return progress_line(event)
        case event:
            raise AssertionError(event)


def _numbers(metrics: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """By what a line of the log is known again; how many steps the run has may not have been known when it was said."""
    return frozenset((name, finite(value)) for name, value in metrics.items() if name != "total_steps")
