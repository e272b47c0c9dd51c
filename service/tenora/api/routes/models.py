"""/v1/models: the base and the tenant's adapters, by every name that they have."""

from __future__ import annotations

from fastapi import APIRouter

from tenora.api.dependencies import ControlDep, Infer, ManageAdapters
from tenora.api.schemas.base import Deleted, ListResponse
from tenora.api.schemas.files import ModelObject

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(caller: Infer, control: ControlDep) -> ListResponse[ModelObject]:
    """What this key can call."""
    return ListResponse.page([ModelObject.of(card) for card in await control.models.list(caller)])


@router.get("/v1/models/{model:path}")
async def get_model(model: str, caller: Infer, control: ControlDep) -> ModelObject:
    """One model; the name may hold slashes."""
    return ModelObject.of(await control.models.get(caller, model))


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, caller: ManageAdapters, control: ControlDep) -> Deleted:
    """Delete an adapter by any of its names; the base stays."""
    await control.models.delete(caller, model)
    return Deleted(id=model, object="model")
