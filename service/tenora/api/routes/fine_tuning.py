"""/v1/fine_tuning/jobs."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from tenora.api.dependencies import ControlDep, JsonRoute, LifecycleDep, may
from tenora.api.idempotency import once
from tenora.api.schemas.base import ListResponse
from tenora.api.schemas.estimates import EstimateObject
from tenora.api.schemas.fine_tuning import JobCreateRequest
from tenora.api.schemas.jobs import CheckpointObject, JobEventObject, JobObject
from tenora.api.sse import while_connected
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError

router = APIRouter(tags=["fine-tuning"], route_class=JsonRoute)
JOBS = "/v1/fine_tuning/jobs"
_METADATA = re.compile(r"metadata\[([^\]]{1,64})\]")
After = Annotated[str | None, Query(max_length=128)]


@router.post(JOBS, response_model=JobObject)
async def create_job(
    body: JobCreateRequest, request: Request, caller: Annotated[Principal, may("jobs.create")], control: ControlDep
) -> Response:
    """Train an adapter on an uploaded file; the job says what became of it."""
    create = partial(control.jobs.create, caller, body.to_request())
    return await once(request, control, caller, await request.body(), create, JobObject.of)


@router.post("/v1/fine_tuning/estimate")
async def estimate_job(
    body: JobCreateRequest,
    request: Request,
    caller: Annotated[Principal, may("jobs.estimate")],
    control: ControlDep,
    lifecycle: LifecycleDep,
) -> EstimateObject:
    """What a job with this body would take: rows, tokens, steps and time. Nothing is stored."""
    estimate = control.estimates.estimate(caller, body.to_request())
    return EstimateObject.of(await while_connected(estimate, request.receive, lifecycle))


def metadata_filter(
    request: Request,
    metadata: Annotated[str | None, Query(description="As metadata[key]=value; may be repeated.")] = None,
) -> dict[str, str] | None:
    """The pairs of `metadata[key]=value` in the query.

    Raises:
        InvalidRequestError: for `metadata` in another shape; ignoring it would list too much.
    """
    wanted: dict[str, str] = {}
    malformed = metadata not in {None, "null"}
    for name, value in request.query_params.multi_items():
        match = _METADATA.fullmatch(name)
        if match is not None:
            wanted[match[1]] = value
        else:
            malformed = malformed or name.startswith("metadata[")
    if malformed:
        raise InvalidRequestError("Write the filter as metadata[key]=value.", param="metadata")
    return wanted or None


@router.get(JOBS)
async def list_jobs(
    caller: Annotated[Principal, may("jobs.list")],
    control: ControlDep,
    metadata: Annotated[dict[str, str] | None, Depends(metadata_filter)],
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> ListResponse[JobObject]:
    """The tenant's jobs, newest first; `metadata[key]=value` keeps those that carry the pair."""
    page = await control.jobs.list(caller, after=after, limit=limit, metadata=metadata)
    return ListResponse.page([JobObject.of(record) for record in page.items], has_more=page.has_more)


@router.get(JOBS + "/{job_id}")
async def get_job(job_id: str, caller: Annotated[Principal, may("jobs.read")], control: ControlDep) -> JobObject:
    """One job."""
    return JobObject.of(await control.jobs.get(caller, job_id))


@router.post(JOBS + "/{job_id}/cancel")
async def cancel_job(job_id: str, caller: Annotated[Principal, may("jobs.cancel")], control: ControlDep) -> JobObject:
    """End a job; what it trained so far is dropped."""
    return JobObject.of(await control.jobs.cancel(caller, job_id))


@router.post(JOBS + "/{job_id}/pause")
async def pause_job(job_id: str, caller: Annotated[Principal, may("jobs.pause")], control: ControlDep) -> JobObject:
    """Stop a job and keep its state."""
    return JobObject.of(await control.jobs.pause(caller, job_id))


@router.post(JOBS + "/{job_id}/resume")
async def resume_job(job_id: str, caller: Annotated[Principal, may("jobs.resume")], control: ControlDep) -> JobObject:
    """Let a paused job go on."""
    return JobObject.of(await control.jobs.resume(caller, job_id))


@router.get(JOBS + "/{job_id}/events")
async def list_job_events(
    job_id: str,
    caller: Annotated[Principal, may("jobs.events")],
    control: ControlDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> ListResponse[JobEventObject]:
    """The job's log, newest first."""
    page = await control.jobs.events(caller, job_id, after=after, limit=limit)
    return ListResponse.page([JobEventObject.of(record) for record in page.items], has_more=page.has_more)


@router.get(JOBS + "/{job_id}/checkpoints")
async def list_job_checkpoints(
    job_id: str,
    caller: Annotated[Principal, may("jobs.checkpoints")],
    control: ControlDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
) -> ListResponse[CheckpointObject]:
    """The job's checkpoints, newest first."""
    page = await control.jobs.checkpoints(caller, job_id, after=after, limit=limit)
    return ListResponse.page([CheckpointObject.of(record) for record in page.items], has_more=page.has_more)
