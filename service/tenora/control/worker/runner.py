"""Claims jobs under leases and works on them: a few are prepared at a time, up to `max_running_jobs` train.

Of those that train in a process of their own there is one at a time: such a process needs the memory of a whole base.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, LeaseLostError
from tenora.control.jobs.leases import RENEW_SECONDS, Leases
from tenora.control.jobs.rows import is_over, peek_job, unfinished
from tenora.control.registry.database import RegistryBusyError
from tenora.control.storage.directory import remove
from tenora.control.worker.preparing import prepare_job
from tenora.control.worker.training import JobTraining
from tenora.errors import TrainingError
from tenora.training.methods.table import APART

_log = logging.getLogger(__name__)

PREPARING = 4  # jobs that are prepared at the same time, each another tenant's
STOP_SECONDS = 10.0  # what `stop` allows for saving the state of runs


@dataclass(slots=True)
class _Work:
    """A claimed job and what this process does for it; `training` is None while it is prepared."""

    claim: Claim
    task: asyncio.Task[None]
    training: JobTraining | None


class JobRunner:
    """Works on jobs until `stop`; `leases` are this process's.

    Attributes:
        leases_lost: jobs that another process claimed while this one worked on them.
    """

    def __init__(self, context: JobContext, leases: Leases, tell_lost: Callable[[int], None] = lambda _: None) -> None:
        """`tell_lost` hears each new value of `leases_lost`."""
        self.leases_lost = 0
        self._tell_lost = tell_lost
        self._context = context
        self._leases = leases
        self._works: dict[str, _Work] = {}
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over the jobs of a dead process and begin; a service that only serves (`role=serve`) never trains."""
        await self._leases.end_dead()
        await self._sweep_workdirs()
        if self._context.settings.role != "serve":
            self._loop = asyncio.create_task(self._run(), name="job-runner")

    async def stop(self) -> None:
        """Pause what runs, so that the next start goes on, and wait for it."""
        self._closing.set()
        self._wake.set()
        if self._loop is not None:
            await self._loop
        works = list(self._works.values())
        for work in works:
            if work.training is not None:
                await work.training.halt()
        if works:
            _, late = await asyncio.wait([work.task for work in works], timeout=STOP_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._leases.end()

    async def retire(self) -> None:
        """The service is gone, and its engine with it: claim nothing more, and prepare to the end what is in hand.

        Runs are left at their last saved state; whoever comes next goes on with them.
        """
        self._closing.set()
        self._wake.set()
        while preparing := [work.task for work in self._works.values() if work.training is None]:
            await asyncio.wait(preparing, timeout=RENEW_SECONDS)
            with contextlib.suppress(RegistryBusyError):  # the lease lasts for another try
                await self._renew()

    @property
    def worker_up(self) -> bool | None:
        """Whether it claims jobs; None where the role is not to train."""
        return None if self._context.settings.role == "serve" else self._loop is not None and not self._loop.done()

    def wake(self) -> None:
        """There may be something to claim."""
        self._wake.set()

    async def leave(self, tenant_id: str, job_id: str, *, pause: bool) -> None:
        """The job was taken from this worker, if it had it: end its run, and without `pause` forget its files.

        With `pause` this returns when the run has ended and its events are recorded, or after a while.
        """
        work = self._works.get(job_id)
        if work is not None and work.training is not None and pause:
            await work.training.pause()
            await asyncio.wait([work.task], timeout=STOP_SECONDS)
        elif work is not None and work.training is not None:
            await work.training.leave()
        elif work is None and not pause:
            await self._forget(tenant_id, job_id)

    async def _run(self) -> None:
        renewed = time.monotonic()
        while not self._closing.is_set():
            self._wake.clear()
            try:
                await self._claim_all()
                if time.monotonic() - renewed >= RENEW_SECONDS:
                    await self._renew()
                    renewed = time.monotonic()
            except Exception:  # noqa: BLE001 (logged; the loop must outlive any failure)
                # The database may be busy or its disk full for a while: jobs wait, they are not lost.
                _log.exception("jobs could not be claimed; trying again in %g s", RENEW_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._wake.wait()

    async def _renew(self) -> None:
        await self._leases.renew([work.claim for work in self._works.values()])

    async def _claim_all(self) -> None:
        """Fill the free places: `PREPARING`, with no tenant in two of them, and `max_running_jobs` for training."""
        while sum(work.training is None for work in self._works.values()) < PREPARING:
            claim = await self._leases.claim("prepare", self._works.keys(), most_of_tenant=1)
            if claim is None:
                break
            self._begin(claim, None)
        while sum(work.training is not None for work in self._works.values()) < self._context.settings.max_running_jobs:
            claim = await self._leases.claim("train", self._works.keys(), without=self._full_methods())
            if claim is None:
                break
            self._begin(claim, JobTraining(self._context, claim, self._closing))

    def _full_methods(self) -> tuple[str, ...]:
        """Methods whose jobs have to wait: those that take a process and its memory, while one has them."""
        one = any(work.training is not None and work.claim.runs_apart for work in self._works.values())
        return APART if one else ()

    def _begin(self, claim: Claim, training: JobTraining | None) -> None:
        task = asyncio.create_task(self._work(claim, training), name=f"job-{claim.job_id}")
        self._works[claim.job_id] = _Work(claim, task, training)

    async def _work(self, claim: Claim, training: JobTraining | None) -> None:
        try:
            await (prepare_job(self._context, claim) if training is None else training.run())
        except LeaseLostError as error:
            self._lost(claim, error)
        except RegistryBusyError as error:
            # The job is as the registry says: it is claimed again when its lease has run out.
            _log.warning("job %s: %s It goes on then.", claim.job_id, error.message)
        except Exception:  # noqa: BLE001 (logged, and the job ends with it)
            # A defect of ours: the job must not be claimed again and again, and its owner must hear of it.
            _log.exception("job %s ended with an unexpected error", claim.job_id)
            await self._give_up(claim)
        finally:
            try:
                if not self._closing.is_set():
                    await self._forget_if_over(claim)
            except RegistryBusyError:
                _log.warning("job %s: the registry is busy; the next start looks at its files", claim.job_id)
            finally:
                del self._works[claim.job_id]
                self._wake.set()

    async def _give_up(self, claim: Claim) -> None:
        try:
            await self._context.fail(
                claim,
                TrainingError("The job ended with an internal error; the server's log has it.", code="internal_error"),
            )
        except LeaseLostError as error:
            self._lost(claim, error)
        except RegistryBusyError as error:
            _log.warning("job %s: that it failed was not recorded. %s", claim.job_id, error.message)

    def _lost(self, claim: Claim, error: LeaseLostError) -> None:
        if error.holder is None or error.holder == self._leases.owner:
            _log.info("job %s changed hands", claim.job_id)
            return
        self.leases_lost += 1
        self._tell_lost(self.leases_lost)
        _log.warning("job %s was taken over by %s: this process had let its lease run out", claim.job_id, error.holder)

    async def _forget_if_over(self, claim: Claim) -> None:
        async with self._context.database.read() as session:
            row = await peek_job(session, claim.tenant_id, claim.job_id)
        if row is None or is_over(row):
            await self._forget(claim.tenant_id, claim.job_id)

    async def _forget(self, tenant_id: str, job_id: str) -> None:
        """Let go of what only an unfinished job needs: its files, and the adapter that it started from."""
        await asyncio.to_thread(remove, self._context.storage.workdir(tenant_id, job_id))
        async with self._context.database.read() as session:
            row = await peek_job(session, tenant_id, job_id)
        if row is not None and row.parent_digest is not None:
            await self._context.blobs.release([row.parent_digest])

    async def _sweep_workdirs(self) -> None:
        """At start: remove the work directories of jobs that have ended or were never recorded."""
        async with self._context.database.read() as session:
            known = await unfinished(session)

        def remove_leftovers() -> None:
            for tenant_id, job_id, path in self._context.storage.workdirs():
                if (tenant_id, job_id) not in known:
                    remove(path)

        await asyncio.to_thread(remove_leftovers)
