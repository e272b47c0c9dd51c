"""Rows of aliases, versions and checkpoints inside an open transaction: what names mean, what is pinned and named."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, false, func, select, union

from tenora.control.registry.database import Session
from tenora.control.registry.ids import DIGEST_PREFIX
from tenora.control.registry.tables import TERMINAL, AdapterRow, AdapterVersionRow, CheckpointRow, JobRow
from tenora.errors import InvalidRequestError

Pair = tuple[AdapterRow, AdapterVersionRow]
"""An alias and one of its versions."""


async def find_alias(session: Session, tenant_id: str, name: str) -> AdapterRow | None:
    """The tenant's alias of that name."""
    found: AdapterRow | None = await session.scalar(
        select(AdapterRow).where(AdapterRow.tenant_id == tenant_id, AdapterRow.name == name)
    )
    return found


async def alias_of(session: Session, version: AdapterVersionRow) -> AdapterRow | None:
    """The alias that a version belongs to."""
    found: AdapterRow | None = await session.scalar(
        select(AdapterRow).where(AdapterRow.tenant_id == version.tenant_id, AdapterRow.id == version.adapter_id)
    )
    return found


async def active_version(session: Session, tenant_id: str, name: str) -> Pair | None:
    """The version that the alias of that name points at."""
    found = await _pairs(session, _active(tenant_id).where(AdapterRow.name == name))
    return found[0] if found else None


async def active_digest(session: Session, tenant_id: str, name: str) -> str | None:
    """The digest of the version that the alias of that name points at; asked for by every request."""
    query = _active(tenant_id).where(AdapterRow.name == name)
    found: str | None = await session.scalar(query.with_only_columns(AdapterVersionRow.digest))
    return found


async def digests_of(session: Session, tenant_id: str, name: str, prefix: str) -> set[str]:
    """The digests of an alias's versions that begin so."""
    query = _versions(tenant_id).where(AdapterRow.name == name, AdapterVersionRow.digest.startswith(prefix))
    return set(await session.scalars(query.with_only_columns(AdapterVersionRow.digest)))


async def result_digest(session: Session, tenant_id: str, model_name: str) -> str | None:
    """The digest of a job's result or of a checkpoint, by its `ft:` name."""
    for table in (AdapterVersionRow, CheckpointRow):
        found: str | None = await session.scalar(
            select(table.digest).where(table.tenant_id == tenant_id, table.model_name == model_name)
        )
        if found is not None:
            return found
    return None


async def active_versions(session: Session, tenant_id: str) -> list[Pair]:
    """The version that each alias of a tenant points at, by name."""
    return await _pairs(session, _active(tenant_id).order_by(AdapterRow.name))


async def versions_of(session: Session, tenant_id: str, name: str, version: int | str | None = None) -> list[Pair]:
    """The versions of an alias, newest first; of those whose number is `version`, or whose digest begins so.

    Raises:
        InvalidRequestError: `version` is neither a number nor at least 8 hex digits.
    """
    query = _versions(tenant_id).where(AdapterRow.name == name)
    if version is not None:
        query = query.where(_called(version))
    return await _pairs(session, query.order_by(AdapterVersionRow.version.desc()))


async def all_versions(session: Session, tenant_id: str) -> list[Pair]:
    """Every version of every alias of a tenant, by name, the newest first."""
    return await _pairs(session, _versions(tenant_id).order_by(AdapterRow.name, AdapterVersionRow.version.desc()))


async def newest_number(session: Session, alias: AdapterRow) -> int:
    """The highest number that a version of the alias has; 0 if it has none."""
    newest: int | None = await session.scalar(
        select(func.max(AdapterVersionRow.version)).where(
            AdapterVersionRow.tenant_id == alias.tenant_id, AdapterVersionRow.adapter_id == alias.id
        )
    )
    return newest or 0


async def count_versions(session: Session, alias: AdapterRow) -> int:
    """How many versions the alias has."""
    count: int | None = await session.scalar(
        select(func.count()).where(
            AdapterVersionRow.tenant_id == alias.tenant_id, AdapterVersionRow.adapter_id == alias.id
        )
    )
    return count or 0


async def result_version(session: Session, tenant_id: str, model_name: str) -> AdapterVersionRow | None:
    """The version that a job made, by its `ft:` name."""
    found: AdapterVersionRow | None = await session.scalar(
        select(AdapterVersionRow).where(
            AdapterVersionRow.tenant_id == tenant_id, AdapterVersionRow.model_name == model_name
        )
    )
    return found


async def created_at(session: Session, tenant_id: str, digest: str) -> int | None:
    """When a version of that content was made."""
    found: int | None = await session.scalar(
        select(AdapterVersionRow.created_at)
        .where(AdapterVersionRow.tenant_id == tenant_id, AdapterVersionRow.digest == digest)
        .limit(1)
    )
    return found


async def stored_rows(session: Session, tenant_id: str, digest: str) -> bytes | None:
    """What the tenant's newest version of that content has learned: itself, or a job that it is a checkpoint of."""
    found = await _rows(session, tenant_id, AdapterVersionRow.digest == digest)
    if found is not None:
        return found
    jobs = select(CheckpointRow.job_id).where(CheckpointRow.tenant_id == tenant_id, CheckpointRow.digest == digest)
    return await _rows(session, tenant_id, AdapterVersionRow.job_id.in_(jobs))


async def rows_of_version(session: Session, version: AdapterVersionRow) -> bytes | None:
    """What a version has learned, which its row does not bring along."""
    return await _rows(session, version.tenant_id, AdapterVersionRow.id == version.id)


async def delete_versions(session: Session, tenant_id: str, rows: Sequence[AdapterVersionRow]) -> set[str]:
    """Delete version rows and the checkpoints of their jobs; the digests that they named."""
    jobs = [row.job_id for row in rows if row.job_id is not None]
    of_jobs = (CheckpointRow.tenant_id == tenant_id, CheckpointRow.job_id.in_(jobs))
    digests = {row.digest for row in rows} | set(await session.scalars(select(CheckpointRow.digest).where(*of_jobs)))
    await session.execute(delete(CheckpointRow).where(*of_jobs))
    for row in rows:
        await session.delete(row)
    await session.flush()
    return digests


async def named(session: Session, among: Collection[str] | None = None) -> set[str]:
    """Digests that a row of any tenant names; the only query across tenants besides those at start and of pins."""
    versions, checkpoints = select(AdapterVersionRow.digest), select(CheckpointRow.digest)
    # What an unfinished job starts from is read when its run begins, and again when it goes on after a restart.
    parents = select(JobRow.parent_digest).where(
        JobRow.parent_digest.is_not(None), JobRow.status.not_in(sorted(TERMINAL))
    )
    if among is not None:
        versions = versions.where(AdapterVersionRow.digest.in_(among))
        checkpoints = checkpoints.where(CheckpointRow.digest.in_(among))
        parents = parents.where(JobRow.parent_digest.in_(among))
    return set(await session.scalars(union(versions, checkpoints, parents)))


async def named_by(session: Session, tenant_id: str) -> set[str]:
    """Digests that rows of one tenant name, also as what a job started from."""
    versions = select(AdapterVersionRow.digest).where(AdapterVersionRow.tenant_id == tenant_id)
    checkpoints = select(CheckpointRow.digest).where(CheckpointRow.tenant_id == tenant_id)
    parents = select(JobRow.parent_digest).where(JobRow.tenant_id == tenant_id, JobRow.parent_digest.is_not(None))
    return set(await session.scalars(union(versions, checkpoints, parents)))


async def pinned(session: Session, tenant_id: str | None = None) -> list[str]:
    """The digests that aliases pin, of one tenant or of all; the oldest version first, each once."""
    query = _pinned().order_by(AdapterVersionRow.created_at)
    if tenant_id is not None:
        query = query.where(AdapterRow.tenant_id == tenant_id)
    return list(dict.fromkeys(await session.scalars(query)))


async def is_pinned(session: Session, digest: str) -> bool:
    """Whether an alias of any tenant pins it."""
    return await session.scalar(_pinned().where(AdapterVersionRow.digest == digest).limit(1)) is not None


async def digests_above(session: Session, nbytes: float) -> set[str]:
    """The digests of versions whose weights have more bytes than that, of all tenants."""
    return set(await session.scalars(select(AdapterVersionRow.digest).where(AdapterVersionRow.bytes > nbytes)))


def _called(version: int | str) -> ColumnElement[bool]:
    """A condition for the version with this number, or whose digest begins so (at least 8 hex digits)."""
    if isinstance(version, int) or (version.isdecimal() and len(version) < 8):
        number = int(version)
        # A number that the column cannot hold is nobody's, and the driver would not take it.
        return AdapterVersionRow.version == number if 0 < number < 2**31 else false()
    if DIGEST_PREFIX.fullmatch(version) is None:
        raise InvalidRequestError("version must be a number or at least 8 hex digits of a digest.", param="version")
    return AdapterVersionRow.digest.startswith(version)


def _versions(tenant_id: str) -> Select[Any]:
    """A query for pairs: every version of every alias of a tenant."""
    # Any: SQLAlchemy 2.0 and 2.1 spell a two-column Select differently.
    query: Any = select(AdapterRow, AdapterVersionRow).select_from(AdapterRow)
    narrowed: Select[Any] = query.join(AdapterVersionRow, AdapterVersionRow.adapter_id == AdapterRow.id).where(
        AdapterRow.tenant_id == tenant_id, AdapterVersionRow.tenant_id == tenant_id
    )
    return narrowed


def _active(tenant_id: str) -> Select[Any]:
    return _versions(tenant_id).where(AdapterVersionRow.version == AdapterRow.version)


async def _pairs(session: Session, query: Select[Any]) -> list[Pair]:
    return [(alias, version) for alias, version in await session.execute(query)]


async def _rows(session: Session, tenant_id: str, condition: ColumnElement[bool]) -> bytes | None:
    query = select(AdapterVersionRow.rows).where(
        AdapterVersionRow.tenant_id == tenant_id, condition, AdapterVersionRow.rows.is_not(None)
    )
    stored: bytes | None = await session.scalar(query.order_by(AdapterVersionRow.seq.desc()).limit(1))
    return stored


def _pinned() -> Select[Any]:
    return (
        select(AdapterVersionRow.digest)
        .join_from(AdapterVersionRow, AdapterRow, AdapterRow.id == AdapterVersionRow.adapter_id)
        .where(AdapterRow.pinned.is_(True), AdapterRow.version == AdapterVersionRow.version)
    )
