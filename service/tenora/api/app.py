"""The FastAPI application: middlewares, routes and the objects that they share."""

from __future__ import annotations

import time
from functools import partial

from fastapi import FastAPI
from starlette.middleware import Middleware

from tenora import __version__
from tenora.api import document, errors
from tenora.api.lifecycle import Lifecycle
from tenora.api.middleware import Authentication, BodyLimit, DrainGate, RequestContext
from tenora.api.routes import (
    adapters,
    admin,
    chat,
    completions,
    files,
    fine_tuning,
    lora_compat,
    models,
    operations,
    pooling,
)
from tenora.config import Settings
from tenora.control.control import Control
from tenora.control.tenancy.access import Attempt
from tenora.telemetry.metrics import Metrics

DESCRIPTION = "Trains and serves many tenants' LoRA adapters on one frozen base model. OpenAI-compatible."


def create_app(control: Control, settings: Settings) -> FastAPI:
    """The application over an open control plane. Its owner opens and closes `control`.

    `app.state.lifecycle` drains it: see `tenora.api.lifecycle.Lifecycle`.
    """
    lifecycle = Lifecycle()
    metrics = build_metrics(control)
    control.access.hooks.append(partial(count_refusals, metrics))
    app = FastAPI(
        title="Tenora",
        version=__version__,
        description=DESCRIPTION,
        redirect_slashes=False,  # a redirect would tell a route's existence, and clients drop the key on the way
        middleware=[
            Middleware(RequestContext, metrics=metrics),
            Middleware(DrainGate, lifecycle=lifecycle),
            Middleware(Authentication, authenticate=control.keys.authenticate),
            Middleware(BodyLimit, settings=settings),
        ],
    )
    app.state.control = control
    app.state.settings = settings
    app.state.lifecycle = lifecycle
    app.state.metrics = metrics
    errors.install(app)
    app.include_router(operations.router)
    if settings.role != "train":  # a training replica takes no public inference
        app.include_router(chat.router)
        app.include_router(completions.router)
        app.include_router(pooling.router)
    for module in (models, files, fine_tuning, adapters, lora_compat, admin):
        app.include_router(module.router)
    document.install(app)
    return app


def build_metrics(control: Control) -> Metrics:
    """Metrics that read the job runner of `control` and the engine behind it."""
    engine = control.engine

    def last_step() -> float:
        # The engine's clock is monotonic; scrapers compare Unix times.
        return time.time() - (time.monotonic() - engine.last_heartbeat)

    return Metrics(
        control.inference.base_id,
        stats=lambda: engine.stats,
        last_step=last_step,
        leases_lost=lambda: control.jobs.leases_lost,
        worker_up=lambda: control.jobs.worker_up,
        cache=lambda: engine.ready.memory,
    )


async def count_refusals(metrics: Metrics, attempt: Attempt) -> None:
    """A hook of `Access`: the metrics count what keys may not do."""
    if not attempt.allowed:
        metrics.refused(attempt.action)
