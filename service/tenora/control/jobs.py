"""Fine-tuning jobs: the use cases that the API calls. The work itself is `tenora.control.runner`'s."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sqlalchemy import false, select
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.control.database import Database
from tenora.control.failpoints import Failpoints
from tenora.control.files import TRAINING_PURPOSE, find_file
from tenora.control.idempotency import Receipt
from tenora.control.job_requests import MAX_SEED, METADATA_KEY, Limits, alias_of, check_request
from tenora.control.job_rows import (
    UNFINISHED,
    checkpoint_record,
    count_jobs,
    drop_lease,
    end,
    event_record,
    find_job,
    is_over,
    job_record,
    log,
)
from tenora.control.names import new_id, unix_now
from tenora.control.paging import page
from tenora.control.records import CheckpointRecord, JobEventRecord, JobRecord, JobRequest, Page, Principal
from tenora.control.schema import CheckpointRow, JobEventRow, JobRow
from tenora.errors import ConflictError, InvalidRequestError

if TYPE_CHECKING:
    from tenora.control.runner import JobRunner


class Jobs:
    """Create, read and steer the fine-tuning jobs of a tenant. Every method needs the scope `train`."""

    def __init__(
        self,
        database: Database,
        runner: JobRunner,
        limits: Callable[[], Limits],
        admit: Callable[[], None],
        failpoints: Failpoints,
    ) -> None:
        self._database = database
        self._runner = runner
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
                or with unusable rows.
            NotFoundError: no such file.
            UnavailableError: the server drains.
        """
        principal.require("train")
        self._admit()
        limits = self._limits()
        hyperparameters = check_request(request, limits)
        job_id = new_id("ftjob")
        row = JobRow(
            id=job_id,
            tenant_id=principal.tenant_id,
            model=request.model,
            status="validating_files",
            training_file=request.training_file,
            validation_file=request.validation_file,
            hyperparameters=dict(hyperparameters),
            lora=dict(request.lora),
            training=dict(request.training),
            method=None if request.method is None else dict(request.method),
            suffix=request.suffix,
            name=alias_of(request, job_id, limits),
            seed=secrets.randbelow(MAX_SEED) if request.seed is None else request.seed,
            labels=None if request.metadata is None else dict(request.metadata),
            created_at=unix_now(),
            result_files=[],
            attempts=0,
            lease_token=0,
        )
        async with self._database.write() as session:
            await _check_file(session, principal.tenant_id, request.training_file, "training_file")
            if request.validation_file is not None:
                await _check_file(session, principal.tenant_id, request.validation_file, "validation_file")
            session.add(row)
            await session.flush()
            log(session, row, f"Created fine-tuning job: {job_id}")
            log(session, row, f"Validating training file: {request.training_file}")
            if request.validation_file is not None:
                log(session, row, f"Validating validation file: {request.validation_file}")
            if receipt is not None:
                await receipt.write(session, job_record(row, principal.tenant))
        self._failpoints.hit("jobs.after_create")
        self._runner.wake()
        return job_record(row, principal.tenant)

    async def counts(self) -> Mapping[str, int]:
        """How many jobs there are in each status, of all tenants: for the operator's metrics, names no one."""
        async with self._database.read() as session:
            return await count_jobs(session)

    @property
    def leases_lost(self) -> int:
        """Jobs that another process took from this one since its start, because it had let their lease run out."""
        return self._runner.leases_lost

    async def list(
        self,
        principal: Principal,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[JobRecord]:
        """One page of the tenant's jobs, newest first; with `metadata` only those that carry all its entries."""
        principal.require("train")
        query = select(JobRow).where(JobRow.tenant_id == principal.tenant_id)
        for key, value in (metadata or {}).items():
            # A key that no job can have would make a malformed JSON path.
            usable = METADATA_KEY.fullmatch(key) is not None
            query = query.where(JobRow.labels[key].as_string() == value if usable else false())
        async with self._database.read() as session:
            return await page(
                session, query, JobRow, lambda row: job_record(row, principal.tenant), after=after, limit=limit
            )

    async def get(self, principal: Principal, job_id: str) -> JobRecord:
        """One job, or NotFoundError."""
        principal.require("train")
        async with self._database.read() as session:
            return job_record(await find_job(session, principal.tenant_id, job_id), principal.tenant)

    async def cancel(self, principal: Principal, job_id: str) -> JobRecord:
        """End a job for good. ConflictError if it has ended already."""
        principal.require("train")
        async with self._database.write() as session:
            row = await find_job(session, principal.tenant_id, job_id)
            if is_over(row):
                raise ConflictError(f"The job {job_id} has ended ({row.status}) and cannot be cancelled.")
            end(row, "cancelled")
            log(session, row, "The job was cancelled")
        await self._runner.leave(principal.tenant_id, job_id, pause=False)
        return job_record(row, principal.tenant)

    async def pause(self, principal: Principal, job_id: str) -> JobRecord:
        """Stop a job so that `resume` goes on where it was. ConflictError if it has ended or is paused."""
        principal.require("train")
        async with self._database.write() as session:
            row = await find_job(session, principal.tenant_id, job_id)
            if row.status not in UNFINISHED:
                raise ConflictError(f"The job {job_id} is {row.status} and cannot be paused.")
            row.status = "paused"
            row.estimated_finish = None
            drop_lease(row)
            log(session, row, "The job was paused")
        await self._runner.leave(principal.tenant_id, job_id, pause=True)
        return job_record(row, principal.tenant)

    async def resume(self, principal: Principal, job_id: str) -> JobRecord:
        """Put a paused job back into the queue. ConflictError if it is not paused."""
        principal.require("train")
        self._admit()
        async with self._database.write() as session:
            row = await find_job(session, principal.tenant_id, job_id)
            if row.status != "paused":
                raise ConflictError(f"The job {job_id} is {row.status}; only a paused job can be resumed.")
            row.status = "validating_files" if row.plan is None else "queued"
            log(session, row, "The job was resumed")
        self._runner.wake()
        return job_record(row, principal.tenant)

    async def events(
        self, principal: Principal, job_id: str, *, after: str | None = None, limit: int = 20
    ) -> Page[JobEventRecord]:
        """One page of the job's log, newest first."""
        principal.require("train")
        query = select(JobEventRow).where(JobEventRow.tenant_id == principal.tenant_id, JobEventRow.job_id == job_id)
        async with self._database.read() as session:
            await find_job(session, principal.tenant_id, job_id)
            return await page(session, query, JobEventRow, event_record, after=after, limit=limit)

    async def checkpoints(
        self, principal: Principal, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[CheckpointRecord]:
        """One page of the job's checkpoints, newest first; each is callable until the job's adapter is deleted."""
        principal.require("train")
        query = select(CheckpointRow).where(
            CheckpointRow.tenant_id == principal.tenant_id, CheckpointRow.job_id == job_id
        )
        async with self._database.read() as session:
            await find_job(session, principal.tenant_id, job_id)
            return await page(session, query, CheckpointRow, checkpoint_record, after=after, limit=limit)


async def _check_file(session: AsyncSession, tenant_id: str, file_id: str, param: str) -> None:
    row = await find_file(session, tenant_id, file_id, param=param)
    if row.purpose != TRAINING_PURPOSE:
        raise InvalidRequestError(
            f"The file {file_id} has the purpose {row.purpose!r}; upload it with the purpose {TRAINING_PURPOSE!r}.",
            param=param,
        )
    if row.status != "processed":
        raise InvalidRequestError(f"The file {file_id} cannot be used: {row.status_details}", param=param)
