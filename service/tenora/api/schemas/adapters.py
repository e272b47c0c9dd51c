"""Adapters: the native objects, and vLLM's two calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from tenora.api.schemas.base import RequestModel, ResponseModel, invalid
from tenora.api.schemas.evaluation import EvaluationObject


class AdapterObject(ResponseModel):
    """An `AdapterRecord` of the control plane: an alias with the version that it points at, or one of its versions."""

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
    parent_digest: str | None
    resident: Literal["device", "host", "disk"]
    pinned: bool
    evaluation: EvaluationObject | None = Field(description="Of an adapter that a job made.")


def _version(value: Any) -> int | str:
    """As it came: true is no number, and digits in quotes may begin a digest."""
    if type(value) is int or isinstance(value, str):
        return value
    raise invalid("must be the number of a version, or the beginning of its digest")


class RollbackRequest(RequestModel):
    """Which version the alias shall point at: its number, or a prefix of its digest."""

    version: Annotated[int | str, PlainValidator(_version, json_schema_input_type=int | str)]


class LoadLoraAdapterRequest(RequestModel):
    """vLLM's call to load an adapter from a directory of the server."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class UnloadLoraAdapterRequest(RequestModel):
    """vLLM's call to take an adapter away. `lora_int_id` is accepted and not used."""

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None
