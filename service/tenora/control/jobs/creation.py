"""A request becomes the row of a new job."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tenora.control.files.files import TRAINING_PURPOSE
from tenora.control.files.rows import find_file
from tenora.control.jobs.parent import Parent
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.requests import USUAL_SEED, Asked, alias_of
from tenora.control.jobs.shape import Limits
from tenora.control.jobs.sources import Source, check_sources, name_sources
from tenora.control.registry.database import Session
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import FileRow, JobRow
from tenora.errors import InvalidRequestError


def new_job(
    tenant_id: str,
    request: JobRequest,
    asked: Asked,
    limits: Limits,
    sources: Sequence[Source],
    parent: Parent | None,
) -> JobRow:
    """The row, in the status `validating_files`.

    Args:
        request, asked: as sent, and what was found in it.
        sources: with names.
        parent: the adapter to start from.
    """
    job_id = new_id("ftjob")
    listed = None
    if request.training_files is not None:
        listed = [{name: getattr(source, name) for name in ("file", "weight", "name")} for source in sources]
    return JobRow(
        id=job_id,
        tenant_id=tenant_id,
        model=limits.base_id,
        status="validating_files",
        training_file=sources[0].file,
        training_files=listed,
        validation_file=request.validation_file,
        requested=asked.to_json(),
        hyperparameters=dict(asked.hyperparameters),
        lora=dict(asked.lora),
        settings=dict(asked.settings),
        method=None if request.method is None else msgspec.to_builtins(request.method),
        sweep=asked.sweep,
        parent=None if parent is None else parent.name,
        parent_digest=None if parent is None else parent.digest,
        suffix=request.suffix,
        name=alias_of(request, job_id, limits),
        seed=USUAL_SEED if request.seed is None else request.seed,
        labels=None if request.metadata is None else dict(request.metadata),
        created_at=unix_now(),
        result_files=[],
        attempts=0,
        lease_token=0,
    )


async def find_sources(session: Session, tenant_id: str, request: JobRequest) -> tuple[Source, ...]:
    """The training files with their names.

    Raises:
        NotFoundError: a file that the request names does not exist, or is another tenant's.
        InvalidRequestError: one has another purpose or unusable rows.
    """
    sources = check_sources(request)
    files = [await _usable_file(session, tenant_id, source.file, _param_of_file(source)) for source in sources]
    if request.validation_file is not None:
        await _usable_file(session, tenant_id, request.validation_file, "validation_file")
    return name_sources(sources, [file.filename for file in files])


def _param_of_file(source: Source) -> str:
    return source.param if source.param == "training_file" else f"{source.param}.file"


async def _usable_file(session: Session, tenant_id: str, file_id: str, param: str) -> FileRow:
    row = await find_file(session, tenant_id, file_id, param=param)
    if row.purpose != TRAINING_PURPOSE:
        raise InvalidRequestError(
            f"The file {file_id} has the purpose {row.purpose!r}; upload it with the purpose {TRAINING_PURPOSE!r}.",
            param=param,
        )
    if row.status != "processed":
        raise InvalidRequestError(f"The file {file_id} cannot be used: {row.status_details}", param=param)
    return row
