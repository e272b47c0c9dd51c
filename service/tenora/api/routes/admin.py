"""/v1/admin: tenants and their keys, for the operator."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response

from tenora.api.dependencies import ControlDep, JsonRoute, may
from tenora.api.schemas.admin import (
    KeyCreateRequest,
    KeyObject,
    NewKeyObject,
    TenantCreateRequest,
    TenantObject,
    TenantUpdateRequest,
)
from tenora.api.schemas.base import Deleted, ListResponse
from tenora.control.tenancy.records import Principal

router = APIRouter(tags=["admin"], route_class=JsonRoute)
TENANTS = "/v1/admin/tenants"
ONE = TENANTS + "/{tenant}"
KEYS = ONE + "/keys"


@router.post(TENANTS, status_code=201)
async def create_tenant(
    body: TenantCreateRequest, _: Annotated[Principal, may("tenants.create")], control: ControlDep
) -> TenantObject:
    """Add a tenant, which has no keys yet."""
    return TenantObject.of(await control.tenants.create(body.name))


@router.get(TENANTS)
async def list_tenants(_: Annotated[Principal, may("tenants.list")], control: ControlDep) -> ListResponse[TenantObject]:
    """Every tenant, by name."""
    return ListResponse.page([TenantObject.of(record) for record in await control.tenants.list()])


@router.get(ONE)
async def get_tenant(tenant: str, _: Annotated[Principal, may("tenants.read")], control: ControlDep) -> TenantObject:
    """One tenant."""
    return TenantObject.of(await control.tenants.get(tenant))


@router.patch(ONE)
async def update_tenant(
    tenant: str, body: TenantUpdateRequest, _: Annotated[Principal, may("tenants.update")], control: ControlDep
) -> TenantObject:
    """Give a tenant another share of the workers; it counts from the next job that one of them takes."""
    return TenantObject.of(await control.tenants.set_weight(tenant, body.weight))


@router.delete(ONE)
async def delete_tenant(tenant: str, _: Annotated[Principal, may("tenants.delete")], control: ControlDep) -> Deleted:
    """Delete a tenant with its keys, jobs, files and adapters. Requests that were accepted finish."""
    await control.erasure.erase(tenant)
    return Deleted(id=tenant, object="tenant")


@router.post(KEYS, status_code=201)
async def create_key(
    tenant: str,
    body: KeyCreateRequest,
    response: Response,
    _: Annotated[Principal, may("keys.create")],
    control: ControlDep,
) -> NewKeyObject:
    """Make a key; its secret is in this answer and nowhere else."""
    owner = await control.tenants.get(tenant)
    record, secret = await control.keys.create(owner.id, body.scopes, name=body.name, expires_in=body.expires_in)
    response.headers["cache-control"] = "no-store"
    return NewKeyObject.made(record, secret)


@router.get(KEYS)
async def list_keys(
    tenant: str, _: Annotated[Principal, may("keys.list")], control: ControlDep
) -> ListResponse[KeyObject]:
    """A tenant's keys, oldest first, revoked ones too."""
    owner = await control.tenants.get(tenant)
    return ListResponse.page([KeyObject.of(record) for record in await control.keys.list(owner.id)])


@router.post(KEYS + "/{key_id}/revoke")
async def revoke_key(
    tenant: str, key_id: str, _: Annotated[Principal, may("keys.revoke")], control: ControlDep
) -> KeyObject:
    """End a key for good. Other processes forget it within TENORA_KEY_CACHE_SECONDS."""
    owner = await control.tenants.get(tenant)
    return KeyObject.of(await control.keys.revoke(owner.id, key_id))
