"""Which immutable adapter version a model name means, within one tenant."""

from __future__ import annotations

from tenora.control.adapters import rows
from tenora.control.registry.database import Session
from tenora.control.registry.ids import DIGEST_PREFIX, NAME_PATTERN
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError


def split_canonical(principal: Principal, name: str) -> str | None:
    """`name` without its `<tenant>/`; None if that names another tenant, or what remains is no adapter's name."""
    tenant, slash, rest = name.rpartition("/")
    if slash and tenant != principal.tenant:
        return None
    return rest if NAME_PATTERN.fullmatch(rest) else None


async def find_digest(session: Session, principal: Principal, name: str) -> str | None:
    """The digest that `name` means for this tenant now, or None.

    Understood are `name`, `tenant/name`, either with `@<digest prefix of at least 8 hex digits>`, a job's result
    (`ft:…`) and a checkpoint (`ft:…:ckpt-step-N`).

    Raises:
        InvalidRequestError: a digest prefix that several versions share.
    """
    if name.startswith("ft:"):
        return await rows.result_digest(session, principal.tenant_id, name)
    alias, at, prefix = name.partition("@")
    bare = split_canonical(principal, alias)
    if bare is None or (at and DIGEST_PREFIX.fullmatch(prefix) is None):
        return None
    if not at:
        return await rows.active_digest(session, principal.tenant_id, bare)
    digests = await rows.digests_of(session, principal.tenant_id, bare, prefix)
    if len(digests) > 1:
        raise InvalidRequestError(
            f"Several versions of {bare!r} begin with {prefix!r}; give more digits.", param="model"
        )
    return digests.pop() if digests else None
