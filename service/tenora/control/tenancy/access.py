"""Who may do what: one table of actions, one check, and the place where audit, quotas and metering hook in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from tenora.control.tenancy.records import Principal, Scope
from tenora.control.tenancy.tenants import DEFAULT_TENANT
from tenora.errors import PermissionDeniedError

Need = Scope | Literal["any key", "operator"]
"""What an action asks of a key. The operator's are those of the default tenant with the scope `admin`."""

ACTIONS: Final[Mapping[str, Need]] = MappingProxyType(
    {
        "service.health": "any key",
        "service.metrics": "any key",
        "models.list": "infer",
        "models.read": "infer",
        "models.delete": "adapters",  # deleting a model is deleting an adapter
        "chat.create": "infer",
        "completions.create": "infer",
        "embeddings.create": "infer",
        "classifications.create": "infer",
        "pooling.create": "infer",
        "rewards.create": "infer",
        "files.create": "train",
        "files.list": "train",
        "files.read": "train",
        "files.preview": "train",
        "files.download": "train",
        "files.delete": "train",
        "jobs.create": "train",
        "jobs.estimate": "train",
        "jobs.list": "train",
        "jobs.read": "train",
        "jobs.events": "train",
        "jobs.checkpoints": "train",
        "jobs.cancel": "train",
        "jobs.pause": "train",
        "jobs.resume": "train",
        "adapters.import": "adapters",
        "adapters.list": "adapters",
        "adapters.read": "adapters",
        "adapters.versions": "adapters",
        "adapters.rollback": "adapters",
        "adapters.pin": "adapters",
        "adapters.unpin": "adapters",
        "adapters.download": "adapters",
        "adapters.delete": "adapters",
        "adapters.load": "operator",  # what lies in the operator's directories may be anybody's
        "adapters.unload": "adapters",
        "tenants.create": "operator",
        "tenants.list": "operator",
        "tenants.read": "operator",
        "tenants.update": "operator",
        "tenants.delete": "operator",
        "keys.create": "operator",
        "keys.list": "operator",
        "keys.revoke": "operator",
    }
)
"""Every action of the service, `<what>.<verb>`, and what it asks of a key."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """An action that a caller asked for, and whether the key may do it.

    Attributes:
        resource: the id or name that the call is about; None where it makes or lists things.
    """

    principal: Principal
    action: str
    resource: str | None
    allowed: bool


AccessHook = Callable[[Attempt], Awaitable[None]]
"""Is told of each attempt before anything is done. What it raises refuses an attempt that was allowed (a quota)."""


class Access:
    """The one place that decides. Whose resource it is, is for the queries: each takes the tenant.

    Attributes:
        hooks: called one after the other at every check.
    """

    def __init__(self) -> None:
        self.hooks: list[AccessHook] = []

    async def check(self, principal: Principal, action: str, resource: str | None = None) -> None:
        """Let the caller pass, or raise PermissionDeniedError (or what a hook raises).

        `action` is one of `ACTIONS`.
        """
        need = ACTIONS[action]
        allowed = _meets(principal, need)
        attempt = Attempt(principal, action, resource, allowed)
        for hook in self.hooks:
            await hook(attempt)
        if not allowed:
            raise _refusal(principal, need)


def _meets(principal: Principal, need: Need) -> bool:
    if need == "any key":
        return True
    if need == "operator":
        return principal.tenant == DEFAULT_TENANT and "admin" in principal.scopes
    return need in principal.scopes or "admin" in principal.scopes


def _refusal(principal: Principal, need: Need) -> PermissionDeniedError:
    if need == "operator":
        return PermissionDeniedError(
            f"Only the operator may do this; use a key of the tenant {DEFAULT_TENANT!r} with the scope 'admin'."
        )
    return PermissionDeniedError(
        f"This key lacks the scope {need!r}. Use a key that has it, or create one with "
        f"`tenora keys create --tenant {principal.tenant} --scope {need}`."
    )
