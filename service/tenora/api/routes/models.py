"""/v1/models: the base and the tenant's adapters, by every name that they have."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

from tenora.api.dependencies import ControlDep, may
from tenora.api.schemas.base import Deleted, ListResponse
from tenora.api.schemas.files import ModelObject
from tenora.control.tenancy.records import Principal

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(
    caller: Annotated[Principal, may("models.list")], control: ControlDep
) -> ListResponse[ModelObject]:
    """What this key can call."""
    return ListResponse.page([ModelObject.of(card) for card in await control.models.list(caller)])


@router.get("/v1/models/{model:path}")
async def get_model(model: str, caller: Annotated[Principal, may("models.read")], control: ControlDep) -> ModelObject:
    """One model; the name may hold slashes."""
    return ModelObject.of(await control.models.get(caller, model))


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, caller: Annotated[Principal, may("models.delete")], control: ControlDep) -> Deleted:
    """Delete an adapter by any of its names; the base stays."""
    await control.models.delete(caller, model)
    return Deleted(id=model, object="model")
