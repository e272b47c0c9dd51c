"""What is told of adapters and models, and what a model name means. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tenora.adapters.ref import AdapterRef


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An alias of a tenant together with the immutable version that it points at."""

    id: str
    tenant_id: str
    tenant: str
    name: str
    version: int  # 1, 2, … per alias
    digest: str
    base_model: str
    method: str  # which kind of adapter it is: "lora", "ia3", …
    rank: int
    target_modules: Sequence[str]
    bytes: int
    created_at: int
    source: Literal["job", "upload"]
    job_id: str | None
    parent: str  # what it was trained from: another adapter, or the base
    parent_digest: str | None
    resident: Literal["device", "host", "disk"]
    pinned: bool
    evaluation: Mapping[str, Any] | None
    active: bool  # the alias points at this version
    fine_tuned_model: str | None = None  # ft:… of the job that made it


@dataclass(frozen=True, slots=True)
class ModelCard:
    """An entry of /v1/models. `parent` is None for the base."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


@dataclass(frozen=True, slots=True)
class WeightedVersion:
    """A version of a composition: the name that it was asked by, and its weight with the scale of the whole."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name resolves to.

    Attributes:
        name: what was asked for and is echoed.
        adapter: None is the base.
        composed: of what it is made, if the request composes or scales adapters.
    """

    name: str
    adapter: AdapterRef | None
    tenant_id: str
    cache_salt: str
    composed: Sequence[WeightedVersion] = ()
