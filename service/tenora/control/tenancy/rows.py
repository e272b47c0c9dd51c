"""Rows of tenants, keys and kept answers inside an open transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, or_, select, update

from tenora.control.registry.database import Session
from tenora.control.registry.presence import living
from tenora.control.registry.tables import Base, IdempotencyRow, KeyRow, TenantRow


async def find_tenant(session: Session, name: str, *, writes: bool = False) -> TenantRow | None:
    """The tenant of that name; with `writes` its row is locked until the transaction ends."""
    query = select(TenantRow).where(TenantRow.name == name)
    found: TenantRow | None = await session.scalar(query.with_for_update() if writes else query)
    return found


async def all_tenants(session: Session) -> Sequence[TenantRow]:
    """Every tenant, by name."""
    return (await session.scalars(select(TenantRow).order_by(TenantRow.name))).all()


async def delete_tenant(session: Session, tenant_id: str) -> None:
    """Delete every row of every table that names the tenant, then the tenant."""
    for table in reversed(Base.metadata.sorted_tables):  # what refers to others first
        if "tenant_id" in table.columns:
            await session.execute(delete(table).where(table.c.tenant_id == tenant_id))
    await session.execute(delete(TenantRow).where(TenantRow.id == tenant_id))


async def key_with_tenant(session: Session, prefix: str) -> tuple[KeyRow, TenantRow] | None:
    """The key that has this prefix, whatever became of it, and its tenant."""
    query = select(KeyRow, TenantRow).join(TenantRow, TenantRow.id == KeyRow.tenant_id).where(KeyRow.prefix == prefix)
    found = (await session.execute(query)).one_or_none()
    return None if found is None else (found[0], found[1])


async def find_key(session: Session, tenant_id: str, key_id: str) -> KeyRow | None:
    """A key of the tenant."""
    found: KeyRow | None = await session.scalar(
        select(KeyRow).where(KeyRow.tenant_id == tenant_id, KeyRow.id == key_id)
    )
    return found


async def keys_of(session: Session, tenant_id: str, name: str | None = None) -> Sequence[KeyRow]:
    """The tenant's keys, of one name or all; oldest first, revoked ones too."""
    query = select(KeyRow).where(KeyRow.tenant_id == tenant_id).order_by(KeyRow.created_at, KeyRow.id)
    return (await session.scalars(query if name is None else query.where(KeyRow.name == name))).all()


async def revoke_keys(session: Session, tenant_id: str, at: int, name: str | None = None) -> None:
    """Revoke the tenant's keys, of one name or all; those that are revoked stay as they are."""
    query = update(KeyRow).where(KeyRow.tenant_id == tenant_id, KeyRow.revoked_at.is_(None))
    await session.execute((query if name is None else query.where(KeyRow.name == name)).values(revoked_at=at))


@dataclass(frozen=True, slots=True)
class Reserved:
    """Which row keeps the answer to a request."""

    tenant_id: str
    route: str
    key: str

    @property
    def row(self) -> tuple[ColumnElement[bool], ...]:
        """The condition for it."""
        return (
            IdempotencyRow.tenant_id == self.tenant_id,
            IdempotencyRow.route == self.route,
            IdempotencyRow.key == self.key,
        )


async def find_answer(session: Session, reserved: Reserved) -> IdempotencyRow | None:
    """What is kept of the first request."""
    found: IdempotencyRow | None = await session.scalar(select(IdempotencyRow).where(*reserved.row))
    return found


async def keep_answer(session: Session, reserved: Reserved, status: int, body: bytes) -> None:
    """Keep the answer to a request whose key is reserved."""
    await session.execute(update(IdempotencyRow).where(*reserved.row).values(status=status, body=body))


async def free_key(session: Session, reserved: Reserved) -> None:
    """Free a reserved key; an answer that is kept already stays."""
    await session.execute(delete(IdempotencyRow).where(*reserved.row, IdempotencyRow.status.is_(None)))


async def free_keys_of_the_dead(session: Session) -> None:
    """Free the keys that processes had reserved which are dead now."""
    dead = or_(IdempotencyRow.process_id.is_(None), IdempotencyRow.process_id.not_in(living()))
    await session.execute(delete(IdempotencyRow).where(IdempotencyRow.status.is_(None), dead))


async def forget_answers(session: Session, tenant_id: str, before: int) -> None:
    """Delete the tenant's answers that are older."""
    await session.execute(
        delete(IdempotencyRow).where(IdempotencyRow.tenant_id == tenant_id, IdempotencyRow.created_at < before)
    )
