"""/v1/adapters: import, list, versions, rollback, pin, download, delete."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from tenora.api.dependencies import ControlDep, JsonRoute, LifecycleDep, SettingsDep, may
from tenora.api.idempotency import once
from tenora.api.multipart import BINARY, form_schema, read_form
from tenora.api.schemas.adapters import AdapterObject, RollbackRequest
from tenora.api.schemas.base import Deleted, ListResponse
from tenora.api.sse import while_connected
from tenora.control.tenancy.records import Principal

router = APIRouter(tags=["adapters"], route_class=JsonRoute)
ADAPTERS = "/v1/adapters"
ONE = ADAPTERS + "/{name:path}"  # a canonical name, `tenant/name`, has a slash; so the longer paths are declared first
MAX_CONFIG_BYTES = 2**20
FORM_SCHEMA = form_schema(
    required=("name", "adapter_config", "adapter_model"),
    properties={
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"},
        "adapter_config": BINARY,
        "adapter_model": BINARY,
    },
)


@router.post(ADAPTERS, response_model=AdapterObject, status_code=201, openapi_extra=FORM_SCHEMA)
async def import_adapter(
    request: Request,
    caller: Annotated[Principal, may("adapters.import")],
    control: ControlDep,
    settings: SettingsDep,
    lifecycle: LifecycleDep,
) -> Response:
    """Import an adapter in PEFT's format, or AdapterHub's bottlenecks; under a name in use it is the next version."""
    files = {"adapter_config": MAX_CONFIG_BYTES, "adapter_model": settings.max_adapter_bytes}
    async with read_form(request, settings.root / "staging", fields=("name",), files=files) as form:
        name = form.text("name")
        config = await asyncio.to_thread(form.file("adapter_config").path.read_bytes)
        weights = str(form.file("adapter_model").path)
        store = partial(control.adapters.import_, caller, name=name, config=config, weights=weights)
        stored = once(
            request,
            control,
            caller,
            form.fingerprint(),
            lambda receipt: store(receipt=receipt),
            AdapterObject.of,
            status=201,
        )
        return await while_connected(stored, request.receive, lifecycle)


@router.get(ADAPTERS)
async def list_adapters(
    caller: Annotated[Principal, may("adapters.list")], control: ControlDep
) -> ListResponse[AdapterObject]:
    """The tenant's adapters, each with the version that its name points at."""
    return ListResponse.page([AdapterObject.of(record) for record in await control.adapters.list(caller)])


@router.get(ONE + "/versions")
async def list_versions(
    name: str, caller: Annotated[Principal, may("adapters.versions")], control: ControlDep
) -> ListResponse[AdapterObject]:
    """Every version that the adapter ever had."""
    return ListResponse.page([AdapterObject.of(record) for record in await control.adapters.versions(caller, name)])


@router.post(ONE + "/rollback")
async def roll_back(
    name: str, body: RollbackRequest, caller: Annotated[Principal, may("adapters.rollback")], control: ControlDep
) -> AdapterObject:
    """Point the name at another of its versions. Requests in flight finish on the one they started with."""
    return AdapterObject.of(await control.adapters.rollback(caller, name, body.version))


@router.post(ONE + "/pin")
async def pin_adapter(
    name: str, caller: Annotated[Principal, may("adapters.pin")], control: ControlDep
) -> AdapterObject:
    """Keep the adapter on the device."""
    return AdapterObject.of(await control.adapters.pin(caller, name, True))


@router.post(ONE + "/unpin")
async def unpin_adapter(
    name: str, caller: Annotated[Principal, may("adapters.unpin")], control: ControlDep
) -> AdapterObject:
    """Let the adapter's place on the device go to others again."""
    return AdapterObject.of(await control.adapters.pin(caller, name, False))


@router.get(ONE + "/download", response_class=FileResponse)
async def download_adapter(
    name: str, caller: Annotated[Principal, may("adapters.download")], control: ControlDep
) -> FileResponse:
    """A zip of the directory, which the library of its format (PEFT, or AdapterHub's) loads once unpacked.

    A version that its name does not mean goes by `name@digest` or, if a job made it, by its `ft:` name.
    """
    path = await control.adapters.archive(caller, name)
    return PassingFileResponse(path, media_type="application/zip", filename=f"{name.rsplit('/', 1)[-1]}.zip")


@router.get(ONE)
async def get_adapter(
    name: str, caller: Annotated[Principal, may("adapters.read")], control: ControlDep
) -> AdapterObject:
    """One adapter, by its name, its canonical name, `name@digest` or the `ft:` name of a job's result."""
    return AdapterObject.of(await control.adapters.get(caller, name))


@router.delete(ONE)
async def delete_adapter(
    name: str, caller: Annotated[Principal, may("adapters.delete")], control: ControlDep
) -> Deleted:
    """Delete an adapter and all its versions. Running requests finish."""
    await control.adapters.delete(caller, name)
    return Deleted(id=name, object="adapter")


class PassingFileResponse(FileResponse):
    """Sends a file that was made for this answer, and removes it however the sending ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the file over one ASGI connection."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.to_thread(Path(self.path).unlink, missing_ok=True)
