"""Adapters: the native objects, and vLLM's two calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field

from tenora.api.schemas.base import RequestModel, ResponseModel
from tenora.control.records import AdapterRecord


class AdapterObject(ResponseModel):
    """An adapter: an alias with the version that it points at, or one of its versions."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    tenant: str
    version: int
    active: bool
    digest: str
    base_model: str
    method: str
    rank: int
    target_modules: Sequence[str]
    bytes: int
    created_at: int
    source: Literal["job", "upload"]
    job_id: str | None
    parent: str
    resident: Literal["device", "host", "disk"]
    pinned: bool
    evaluation: dict[str, Any] | None

    @classmethod
    def of(cls, record: AdapterRecord) -> Self:
        """The object of a record."""
        return cls(
            id=record.id,
            name=record.name,
            tenant=record.tenant,
            version=record.version,
            active=record.active,
            digest=record.digest,
            base_model=record.base_model,
            method=record.method,
            rank=record.rank,
            target_modules=record.target_modules,
            bytes=record.bytes,
            created_at=record.created_at,
            source=record.source,
            job_id=record.job_id,
            parent=record.parent,
            resident=record.resident,
            pinned=record.pinned,
            evaluation=None if record.evaluation is None else dict(record.evaluation),
        )


class RollbackRequest(RequestModel):
    """Which version the alias shall point at: its number, or a prefix of its digest."""

    version: int | str = Field(union_mode="left_to_right")


class LoadLoraAdapterRequest(RequestModel):
    """vLLM's call to load an adapter from a directory of the server."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class UnloadLoraAdapterRequest(RequestModel):
    """vLLM's call to take an adapter away. `lora_int_id` is accepted and not used."""

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None
