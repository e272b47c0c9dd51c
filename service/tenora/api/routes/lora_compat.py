"""vLLM's two calls for adapters, for those who drive vLLM: plain-text answers, its own error type."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from tenora.api.dependencies import ControlDep, JsonRoute, LifecycleDep, may
from tenora.api.errors import CompatibilityError
from tenora.api.schemas.adapters import LoadLoraAdapterRequest, UnloadLoraAdapterRequest
from tenora.api.sse import while_connected
from tenora.control.tenancy.records import Principal
from tenora.errors import ConflictError, InvalidRequestError

router = APIRouter(tags=["vLLM compatibility"], route_class=JsonRoute)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(
    body: LoadLoraAdapterRequest,
    request: Request,
    caller: Annotated[Principal, may("adapters.load")],
    control: ControlDep,
    lifecycle: LifecycleDep,
) -> PlainTextResponse:
    """Load an adapter from a directory of the server, which must lie under one of TENORA_ADAPTER_DIRS."""
    if not body.lora_name or not body.lora_path:
        raise CompatibilityError("Both 'lora_name' and 'lora_path' must be given.")
    load = control.adapters.load_path(caller, name=body.lora_name, path=body.lora_path, replace=body.load_inplace)
    try:
        await while_connected(load, request.receive, lifecycle)
    except (ConflictError, InvalidRequestError) as error:
        raise CompatibilityError(error.message, param=error.param) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(
    body: UnloadLoraAdapterRequest, caller: Annotated[Principal, may("adapters.unload")], control: ControlDep
) -> PlainTextResponse:
    """Delete an adapter."""
    if not body.lora_name:
        raise CompatibilityError("'lora_name' must be given.")
    await control.adapters.delete(caller, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
