"""Which adapter a job starts from: `lora.init_from`, or `model` where that names an adapter of the tenant."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tenora.adapters.kinds.lora import LoraConfiguration
from tenora.adapters.kinds.table import parse_config
from tenora.adapters.peft_format import read_config
from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.resolution import find_digest
from tenora.control.jobs.requests import Asked, check_shape
from tenora.control.jobs.shape import Limits, ParentShape
from tenora.control.registry.database import Session
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError, ModelNotFoundError


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter to start from: as it was named, the version that this means now, and its shape."""

    name: str
    digest: str
    shape: ParentShape


async def find_parent(
    session: Session, principal: Principal, asked: Asked, limits: Limits, blobs: Blobs
) -> Parent | None:
    """The adapter that a job names; None starts from the base.

    Raises:
        ModelNotFoundError: no such adapter of this tenant; the same for another tenant's.
        InvalidRequestError: `model` and `lora.init_from` name two adapters, or the shape asked for does not hold it.
    """
    named = {"lora.init_from": asked.lora.get("init_from")}
    if asked.model != limits.base_id:
        named["model"] = asked.model
    found: Parent | None = None
    for param, name in named.items():
        if name is None:
            continue
        digest = await _digest(session, principal, name, param)
        if found is not None and found.digest != digest:
            raise InvalidRequestError(
                f"model and lora.init_from name two adapters; set model to the base {limits.base_id!r}.",
                param="lora.init_from",
            )
        found = found or Parent(name, digest, await parent_shape(blobs, digest))
    if found is not None:
        check_shape(asked, limits, found.shape)
    return found


async def parent_shape(blobs: Blobs, digest: str) -> ParentShape:
    """The shape of a stored adapter."""
    config = parse_config(await asyncio.to_thread(read_config, blobs.store.path(digest)))
    if not isinstance(config, LoraConfiguration):
        raise InvalidRequestError(
            "The adapter to start from is not a LoRA adapter, and LoRA starts from those only; start from the base.",
            param="lora.init_from",
        )
    return ParentShape.of(config, blobs.rows.modules)


async def _digest(session: Session, principal: Principal, name: str, param: str) -> str:
    try:
        digest = await find_digest(session, principal, name)
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, code=error.code, param=param) from error
    if digest is None:
        missing = ModelNotFoundError(name)
        missing.param = param
        raise missing
    return digest
