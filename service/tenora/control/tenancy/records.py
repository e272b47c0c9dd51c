"""Tenants, their keys, and who is calling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["infer", "train", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "train", "adapters", "admin")

LEAST_WEIGHT, MOST_WEIGHT = 0.01, 100.0
LONGEST_KEY_LIFE = 100 * 365 * 24 * 3600
"""Seconds; a key that shall live longer never expires."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling: a tenant, through one key. `admin` implies every scope."""

    tenant_id: str
    tenant: str
    key_id: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant. `name` follows the adapter-name pattern and is part of canonical adapter names.

    Its jobs get workers' time in proportion to `weight` where tenants wait for each other.
    """

    id: str
    name: str
    created_at: int
    weight: float


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key without its secret; `prefix` is the part that may be shown."""

    id: str
    tenant_id: str
    name: str | None
    prefix: str
    scopes: frozenset[str]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
