"""Tenants and keys, as the operator sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field

from tenora.api.schemas.base import RequestModel, ResponseModel
from tenora.control.registry.ids import TENANT_PATTERN
from tenora.control.tenancy.records import LEAST_WEIGHT, LONGEST_KEY_LIFE, MOST_WEIGHT, SCOPES, KeyRecord, Scope


class TenantCreateRequest(RequestModel):
    """POST /v1/admin/tenants."""

    name: str = Field(pattern=f"^{TENANT_PATTERN.pattern}$")


class TenantUpdateRequest(RequestModel):
    """PATCH /v1/admin/tenants/{tenant}."""

    weight: float = Field(ge=LEAST_WEIGHT, le=MOST_WEIGHT)


class TenantObject(ResponseModel):
    """A tenant; `name` is part of its adapters' canonical names, `weight` its share of the workers beside others."""

    id: str
    object: Literal["tenant"] = "tenant"
    name: str
    created_at: int
    weight: float


class KeyCreateRequest(RequestModel):
    """POST /v1/admin/tenants/{tenant}/keys. `expires_in` is in seconds; without it the key never expires."""

    scopes: list[Scope] = Field(min_length=1, max_length=len(SCOPES))
    name: str | None = Field(None, min_length=1, max_length=128)
    expires_in: int | None = Field(None, ge=1, le=LONGEST_KEY_LIFE)


class KeyObject(ResponseModel):
    """A key without its secret; `prefix` is the part that may be shown."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str | None
    prefix: str
    scopes: Sequence[Scope]
    created_at: int
    expires_at: int | None
    revoked_at: int | None

    @classmethod
    def of(cls, record: KeyRecord) -> Self:
        """The answer about a key."""
        return cls.model_validate({**_shown(record)})


class NewKeyObject(KeyObject):
    """A key that was just made; no other answer has its `secret`."""

    secret: str

    @classmethod
    def made(cls, record: KeyRecord, secret: str) -> Self:
        """The answer that shows the secret."""
        return cls.model_validate({**_shown(record), "secret": secret})


def _shown(record: KeyRecord) -> dict[str, object]:
    shown = {name: getattr(record, name) for name in KeyObject.model_fields if name not in {"object", "scopes"}}
    return {**shown, "scopes": sorted(record.scopes)}
