"""Which version of a tenant's a name means: an alias, `tenant/alias`, `alias@digest`, or a job's result (`ft:…`).

A missing adapter and another tenant's give the same NotFoundError.
"""

from __future__ import annotations

from tenora.control.adapters import rows
from tenora.control.adapters.resolution import split_canonical
from tenora.control.registry.database import Session
from tenora.control.registry.ids import DIGEST_PREFIX
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError, NotFoundError


async def require_active(session: Session, principal: Principal, name: str) -> tuple[AdapterRow, AdapterVersionRow]:
    """The alias, and the version that it means now."""
    bare = split_canonical(principal, name)
    found: tuple[AdapterRow, AdapterVersionRow] | None = None
    if bare is not None:
        found = await rows.active_version(session, principal.tenant_id, bare)
    if found is None:
        raise missing(name)
    return found


async def require_meant(session: Session, principal: Principal, name: str) -> tuple[AdapterRow, AdapterVersionRow]:
    """The version that any of its names means, and the alias that it belongs to."""
    if name.startswith("ft:"):
        version = await rows.result_version(session, principal.tenant_id, name)
        owner = None if version is None else await rows.alias_of(session, version)
        if version is None or owner is None:
            raise missing(name)
        return owner, version
    alias, at, digits = name.partition("@")
    if not at:
        return await require_active(session, principal, name)
    if DIGEST_PREFIX.fullmatch(digits) is None:
        raise missing(name)
    return await require_version(session, principal, alias, digits)


async def require_version(
    session: Session, principal: Principal, name: str, version: int | str
) -> tuple[AdapterRow, AdapterVersionRow]:
    """The alias, and the version of it that a number or hex digits mean."""
    alias = await require_alias(session, principal, name)
    found = await rows.versions_of(session, principal.tenant_id, alias.name, version)
    if not found:
        raise NotFoundError(f"The adapter {name!r} has no version {version!r}; list its versions.", param="version")
    if len({row.digest for _, row in found}) > 1:
        raise InvalidRequestError(f"Several versions begin with {version!r}; give more digits.", param="version")
    return alias, found[0][1]


async def require_alias(session: Session, principal: Principal, name: str) -> AdapterRow:
    """The alias, which may mean none of its versions: a job's result that was not to take its name over."""
    bare = split_canonical(principal, name)
    found = None if bare is None else await rows.find_alias(session, principal.tenant_id, bare)
    if found is None:
        raise missing(name)
    return found


def missing(name: str) -> NotFoundError:
    """What is said of a name that means nothing here."""
    return NotFoundError(f"There is no adapter {name!r}; GET /v1/adapters lists yours.", param="name")
