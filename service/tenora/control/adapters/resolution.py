"""Which immutable adapter version a model name means, within one tenant."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.control.registry.ids import DIGEST_PREFIX, NAME_PATTERN
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow, CheckpointRow
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError


def split_canonical(principal: Principal, name: str) -> str | None:
    """`name` without its `<tenant>/`; None if that names another tenant, or what remains is no adapter's name."""
    tenant, slash, rest = name.rpartition("/")
    if slash and tenant != principal.tenant:
        return None
    return rest if NAME_PATTERN.fullmatch(rest) else None


async def find_digest(session: AsyncSession, principal: Principal, name: str) -> str | None:
    """The digest that `name` means for this tenant now, or None.

    Understood are `name`, `tenant/name`, either with `@<digest prefix of at least 8 hex digits>`, a job's result
    (`ft:…`) and a checkpoint (`ft:…:ckpt-step-N`).

    Raises:
        InvalidRequestError: a digest prefix that several versions share.
    """
    if name.startswith("ft:"):
        return await _find_job_result(session, principal.tenant_id, name)
    alias, at, prefix = name.partition("@")
    bare = split_canonical(principal, alias)
    if bare is None or (at and DIGEST_PREFIX.fullmatch(prefix) is None):
        return None
    if not at:
        found: str | None = await session.scalar(
            active_version(principal.tenant_id, bare).with_only_columns(AdapterVersionRow.digest)
        )
        return found
    digests = set(
        await session.scalars(
            versions_of(principal.tenant_id, bare)
            .with_only_columns(AdapterVersionRow.digest)
            .where(AdapterVersionRow.digest.startswith(prefix))
        )
    )
    if len(digests) > 1:
        raise InvalidRequestError(
            f"Several versions of {bare!r} begin with {prefix!r}; give more digits.", param="model"
        )
    return digests.pop() if digests else None


def all_versions(tenant_id: str) -> Select[Any]:
    """A query for (AdapterRow, AdapterVersionRow) of every version of every alias of a tenant."""
    # Any: SQLAlchemy 2.0 and 2.1 spell a two-column Select differently.
    query: Any = select(AdapterRow, AdapterVersionRow).select_from(AdapterRow)
    narrowed: Select[Any] = query.join(AdapterVersionRow, AdapterVersionRow.adapter_id == AdapterRow.id).where(
        AdapterRow.tenant_id == tenant_id, AdapterVersionRow.tenant_id == tenant_id
    )
    return narrowed


def versions_of(tenant_id: str, name: str) -> Select[Any]:
    """The same of one alias."""
    return all_versions(tenant_id).where(AdapterRow.name == name)


def active_version(tenant_id: str, name: str) -> Select[Any]:
    """The same of the version that the alias points at."""
    return versions_of(tenant_id, name).where(AdapterVersionRow.version == AdapterRow.version)


async def pairs(session: AsyncSession, query: Select[Any]) -> list[tuple[AdapterRow, AdapterVersionRow]]:
    """The rows of such a query."""
    return [(alias, version) for alias, version in await session.execute(query)]


async def one_pair(session: AsyncSession, query: Select[Any]) -> tuple[AdapterRow, AdapterVersionRow] | None:
    """The only row of such a query, or None."""
    found = await pairs(session, query)
    return found[0] if found else None


async def _find_job_result(session: AsyncSession, tenant_id: str, name: str) -> str | None:
    digest = await session.scalar(
        select(AdapterVersionRow.digest).where(
            AdapterVersionRow.tenant_id == tenant_id, AdapterVersionRow.model_name == name
        )
    )
    if digest is None:
        digest = await session.scalar(
            select(CheckpointRow.digest).where(CheckpointRow.tenant_id == tenant_id, CheckpointRow.model_name == name)
        )
    return digest
