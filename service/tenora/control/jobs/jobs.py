"""Fine-tuning jobs: the use cases that the API calls. The work itself is `tenora.control.worker.runner`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tenora.control.adapters.blobs import Blobs
from tenora.control.jobs.creation import find_sources, new_job
from tenora.control.jobs.lease_rows import drop_lease, is_held
from tenora.control.jobs.parent import find_parent
from tenora.control.jobs.queue import JobQueue
from tenora.control.jobs.records import CheckpointRecord, JobEventRecord, JobRecord, JobRequest
from tenora.control.jobs.requests import check_request
from tenora.control.jobs.rows import (
    PAUSED_LINE,
    UNFINISHED,
    checkpoint_record,
    checkpoints_of,
    count_jobs,
    end,
    event_record,
    events_of,
    find_job,
    is_over,
    job_record,
    jobs_of,
    log,
    unfinished_jobs,
)
from tenora.control.jobs.shape import Limits
from tenora.control.registry.database import Database
from tenora.control.registry.paging import Page, page
from tenora.control.registry.tables import CheckpointRow, JobEventRow, JobRow
from tenora.control.storage.failpoints import Failpoints
from tenora.control.tenancy.idempotency import Receipt
from tenora.control.tenancy.records import Principal
from tenora.errors import ConflictError


class Jobs:
    """Create, read and steer the fine-tuning jobs of a tenant."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        queue: JobQueue,
        limits: Callable[[], Limits],
        admit: Callable[[], None],
        failpoints: Failpoints,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._queue = queue
        self._limits = limits
        self._admit = admit
        self._failpoints = failpoints

    async def create(
        self, principal: Principal, request: JobRequest, receipt: Receipt[JobRecord] | None = None
    ) -> JobRecord:
        """Check the request and store a job in the status `validating_files`; its rows are read in the background.

        Args:
            receipt: keeps the answer together with the job.

        Raises:
            InvalidRequestError: a field is unknown or out of bounds; `param` names it. Also a file of another purpose
                or with unusable rows, or an adapter to start from that does not fit the shape asked for.
            NotFoundError: no such file.
            ModelNotFoundError: no such adapter to start from.
            UnavailableError: the server drains.
        """
        self._admit()
        limits = self._limits()
        asked = check_request(request, limits)
        async with self._database.write() as session:
            parent = await find_parent(session, principal, asked, limits, self._blobs)
            sources = await find_sources(session, principal.tenant_id, request)
            row = new_job(principal.tenant_id, request, asked, limits, sources, parent)
            session.add(row)
            await session.flush()
            log(session, row, f"Created fine-tuning job: {row.id}")
            for source in sources:
                log(session, row, f"Validating training file: {source.file}")
            if request.validation_file is not None:
                log(session, row, f"Validating validation file: {request.validation_file}")
            if receipt is not None:
                await receipt.write(session, job_record(row, principal.tenant))
        self._failpoints.hit("jobs.after_create")
        self._queue.wake()
        return job_record(row, principal.tenant)

    async def counts(self) -> Mapping[str, int]:
        """How many jobs there are in each status, of all tenants: for the operator's metrics, names no one."""
        async with self._database.read() as session:
            return await count_jobs(session)

    @property
    def worker_up(self) -> bool | None:
        """Whether a worker is there to take jobs; None where none is meant to be."""
        return self._queue.worker_up

    @property
    def leases_lost(self) -> int:
        """Jobs that another process took from this one since its start, because it had let their lease run out."""
        return self._queue.leases_lost

    async def list(
        self,
        principal: Principal,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[JobRecord]:
        """One page of the tenant's jobs, newest first; with `metadata` only those that carry all its entries."""
        query = jobs_of(principal.tenant_id, metadata or {})
        async with self._database.read() as session:
            return await page(
                session, query, JobRow, lambda row: job_record(row, principal.tenant), after=after, limit=limit
            )

    async def get(self, principal: Principal, job_id: str) -> JobRecord:
        """One job, or NotFoundError."""
        async with self._database.read() as session:
            return job_record(await find_job(session, principal.tenant_id, job_id), principal.tenant)

    async def cancel(self, principal: Principal, job_id: str) -> JobRecord:
        """End a job for good. ConflictError if it has ended already."""
        async with self._database.write(frees=True) as session:
            row = await find_job(session, principal.tenant_id, job_id, writes=True)
            if is_over(row):
                raise ConflictError(f"The job {job_id} has ended ({row.status}) and cannot be cancelled.")
            end(row, "cancelled")
            log(session, row, "The job was cancelled")
        await self._queue.leave(principal.tenant_id, job_id, pause=False)
        return job_record(row, principal.tenant)

    async def end_for(self, tenant_id: str) -> None:
        """Cancel every job of a tenant that is not over."""
        async with self._database.write(frees=True) as session:
            rows = await unfinished_jobs(session, tenant_id)
            for row in rows:
                end(row, "cancelled")
        for row in rows:
            await self._queue.leave(tenant_id, row.id, pause=False)

    async def pause(self, principal: Principal, job_id: str) -> JobRecord:
        """Stop a job so that `resume` goes on where it was. ConflictError if it has ended or is paused.

        The worker of a running job keeps its lease until the run has ended and all that it said is in the log.
        """
        async with self._database.write() as session:
            row = await find_job(session, principal.tenant_id, job_id, writes=True)
            if row.status not in UNFINISHED:
                raise ConflictError(f"The job {job_id} is {row.status} and cannot be paused.")
            runs = row.status == "running" and await is_held(session, row)
            row.status = "paused"
            row.estimated_finish = None
            if not runs:
                drop_lease(row)
                log(session, row, PAUSED_LINE)
        await self._queue.leave(principal.tenant_id, job_id, pause=True)
        return job_record(row, principal.tenant)

    async def resume(self, principal: Principal, job_id: str) -> JobRecord:
        """Put a paused job back into the queue. ConflictError if it is not paused."""
        self._admit()
        async with self._database.write() as session:
            row = await find_job(session, principal.tenant_id, job_id, writes=True)
            if row.status != "paused":
                raise ConflictError(f"The job {job_id} is {row.status}; only a paused job can be resumed.")
            row.status = "validating_files" if row.plan is None else "queued"
            if row.lease_owner is not None:  # whoever was to say so when the run had ended did not come to it
                log(session, row, PAUSED_LINE)
            log(session, row, "The job was resumed")
        self._queue.wake()
        return job_record(row, principal.tenant)

    async def events(
        self, principal: Principal, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> Page[JobEventRecord]:
        """One page of the job's log, newest first."""
        query = events_of(principal.tenant_id, job_id)
        async with self._database.read() as session:
            await find_job(session, principal.tenant_id, job_id)
            return await page(session, query, JobEventRow, event_record, after=after, limit=limit)

    async def checkpoints(
        self, principal: Principal, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[CheckpointRecord]:
        """One page of the job's checkpoints, newest first; each is callable until the job's adapter is deleted."""
        query = checkpoints_of(principal.tenant_id, job_id)
        async with self._database.read() as session:
            await find_job(session, principal.tenant_id, job_id)
            return await page(session, query, CheckpointRow, checkpoint_record, after=after, limit=limit)
