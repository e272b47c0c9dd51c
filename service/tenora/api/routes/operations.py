"""Probes and metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from tenora.api.dependencies import ControlDep, LifecycleDep, MetricsDep, may
from tenora.api.lifecycle import Lifecycle
from tenora.control.control import Control
from tenora.control.tenancy.records import Principal
from tenora.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])


@router.get("/livez")
async def livez(control: ControlDep) -> JSONResponse:
    """200 unless a restart of this process would help.

    An engine that died or hung is replaced without one; what is told here is that it cannot be killed, or does not come
    back.
    """
    trouble = control.engine.trouble
    return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)


@router.get("/readyz")
async def readyz(control: ControlDep, lifecycle: LifecycleDep) -> JSONResponse:
    """200 if a request would be served now."""
    return readiness(control, lifecycle)


@router.get("/health")
async def health(
    _: Annotated[Principal, may("service.health")], control: ControlDep, lifecycle: LifecycleDep
) -> JSONResponse:
    """The same, under the name that vLLM's users know."""
    return readiness(control, lifecycle)


def readiness(control: Control, lifecycle: Lifecycle) -> JSONResponse:
    """Whether the server takes requests, and if not why."""
    if lifecycle.draining:
        return JSONResponse({"status": "draining"}, 503)
    if control.damaged:  # liveness does not tell: a new process would meet the same file
        return JSONResponse({"status": "registry is damaged"}, 503)
    if not control.ready():
        return JSONResponse({"status": "engine is starting"}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=Response)
async def metrics(
    _: Annotated[Principal, may("service.metrics")], control: ControlDep, metrics: MetricsDep
) -> Response:
    """Prometheus metrics."""
    return Response(metrics.render(await control.jobs.counts()), media_type=CONTENT_TYPE)
