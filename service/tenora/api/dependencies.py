"""What routes ask for: who is calling, to do what, and the parts of the server that they use.

Authentication itself is a middleware (deny by default); here a route names the action that its caller's key must allow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic_core
from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from tenora.api.lifecycle import Lifecycle
from tenora.config import Settings
from tenora.control.control import Control
from tenora.control.tenancy.access import ACTIONS
from tenora.control.tenancy.records import Principal
from tenora.errors import LONGEST_PARAM, AuthenticationError, InvalidRequestError, brief
from tenora.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Caller:
    """Dependency: the authenticated principal, whose key may do `action` with what the path names."""

    action: str

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"{self.action!r} is not one of the actions of tenora.control.tenancy.access.")

    async def __call__(self, request: Request) -> Principal:
        """The principal, or PermissionDeniedError."""
        principal = getattr(request.state, "principal", None)
        if not isinstance(principal, Principal):
            # The middleware leaves nothing else to happen, and a route must not depend on its being there.
            raise AuthenticationError("No API key. Send it as `Authorization: Bearer <key>`.")
        control: Control = request.app.state.control
        named = "/".join(request.path_params.values())
        await control.access.check(principal, self.action, named or None)
        return principal


def may(action: str) -> Any:
    """What a route's caller depends on: `caller: Annotated[Principal, may("files.read")]`."""
    return Depends(Caller(action))


async def _control(request: Request) -> Control:
    control: Control = request.app.state.control
    return control


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


async def _lifecycle(request: Request) -> Lifecycle:
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle


ControlDep = Annotated[Control, Depends(_control)]
SettingsDep = Annotated[Settings, Depends(_settings)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
LifecycleDep = Annotated[Lifecycle, Depends(_lifecycle)]


class JsonRequest(Request):
    """A request whose JSON is parsed with a bound on its depth (200) and without NaN or infinities."""

    async def json(self) -> Any:
        """The parsed body; HTTPException, with the error that is told to the client as its cause, if it is not JSON."""
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            # FastAPI lets only this class through; the error table looks at the cause.
            raise HTTPException(400) from InvalidRequestError(
                f"The body is not valid JSON: {error}.", code="invalid_json"
            )


class JsonRoute(APIRoute):
    """A route that reads its body as JsonRequest does, and whose query, if it takes one, holds nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI builds, given a JsonRequest."""
        handler = super().get_route_handler()
        known = frozenset(_query_of(self.dependant))

        async def handle(request: Request) -> Response:
            if known:
                _refuse_others(request, known)
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


def _query_of(dependant: Dependant) -> Iterator[str]:
    yield from (parameter.alias for parameter in dependant.query_params)
    for dependency in dependant.dependencies:
        yield from _query_of(dependency)


def _refuse_others(request: Request, known: Collection[str]) -> None:
    """Raise InvalidRequestError for a parameter that is not known; a filter that is passed over lists too much."""
    for name in request.query_params:
        if name not in known and not (name.startswith("metadata[") and "metadata" in known):
            shown = brief(name, LONGEST_PARAM)
            raise InvalidRequestError(
                f"Unknown query parameter {shown!r}. This call takes {', '.join(sorted(known))}.",
                code="unknown_parameter",
                param=shown,
            )
