"""Rows of aliases and versions inside an open transaction: publishing, and how they are handed out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tenora.control.adapters.blobs import Blob
from tenora.control.adapters.records import AdapterRecord
from tenora.control.adapters.row_record import RowRecord
from tenora.control.adapters.rows import find_alias, newest_number
from tenora.control.registry.database import Session
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What a version is made of beside its blob."""

    tenant_id: str
    name: str
    base_model: str
    source: Literal["job", "upload"]
    job_id: str | None = None
    model_name: str | None = None
    evaluation: Mapping[str, Any] | None = None
    parent: str | None = None
    parent_digest: str | None = None
    rows: RowRecord | None = None


async def add_version(
    session: Session, new: NewVersion, blob: Blob, *, moves: bool = True
) -> tuple[AdapterRow, AdapterVersionRow]:
    """Add a version to the alias, which is made if need be, and points at it if it `moves`."""
    now = unix_now()
    alias = await find_alias(session, new.tenant_id, new.name)
    if alias is None:
        alias = AdapterRow(
            id=new_id("adapter"), tenant_id=new.tenant_id, name=new.name, version=0, pinned=False, created_at=now
        )
        session.add(alias)
        await session.flush()
    row = AdapterVersionRow(
        id=new_id("adv"),
        tenant_id=new.tenant_id,
        adapter_id=alias.id,
        version=await newest_number(session, alias) + 1,
        digest=blob.digest,
        base_model=new.base_model,
        method=blob.kind,
        rank=blob.rank,
        target_modules=list(blob.target_modules),
        bytes=blob.bytes,
        created_at=now,
        source=new.source,
        job_id=new.job_id,
        model_name=new.model_name,
        evaluation=None if new.evaluation is None else dict(new.evaluation),
        parent=new.parent,
        parent_digest=new.parent_digest,
        rows=None if new.rows is None else new.rows.encode(),
    )
    session.add(row)
    if moves:
        alias.version = row.version
    await session.flush()
    return alias, row


def adapter_record(
    alias: AdapterRow, row: AdapterVersionRow, *, tenant: str, on_device: frozenset[str]
) -> AdapterRecord:
    """The rows as they are handed out; `on_device` holds the digests that the engine has in slots now."""
    return AdapterRecord(
        id=alias.id,
        tenant_id=row.tenant_id,
        tenant=tenant,
        name=alias.name,
        version=row.version,
        digest=row.digest,
        base_model=row.base_model,
        method=row.method,
        rank=row.rank,
        target_modules=tuple(row.target_modules),
        bytes=row.bytes,
        created_at=row.created_at,
        source=row.source,  # type: ignore[arg-type]  # a column of strings; only these two are written
        job_id=row.job_id,
        parent=row.parent or row.base_model,
        parent_digest=row.parent_digest,
        resident="device" if row.digest in on_device else "disk",
        pinned=alias.pinned,
        evaluation=row.evaluation,
        active=alias.version == row.version,
        fine_tuned_model=row.model_name,
    )
