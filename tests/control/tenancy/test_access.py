"""One check: the table of actions, who meets what they ask for, and the hooks that are told."""

from __future__ import annotations

from typing import get_args

import pytest

from tenora.control.tenancy.access import ACTIONS, Access, Attempt
from tenora.control.tenancy.records import SCOPES, Principal, Scope
from tenora.errors import PermissionDeniedError, RateLimitedError


def key(*scopes: Scope, tenant: str = "acme") -> Principal:
    return Principal(f"tenant-{tenant}", tenant, "key-1", frozenset(scopes))


async def allowed(principal: Principal, action: str) -> bool:
    try:
        await Access().check(principal, action)
    except PermissionDeniedError:
        return False
    return True


@pytest.mark.parametrize("action", sorted(ACTIONS))
async def test_a_scope_opens_its_own_actions_and_admin_every_one_but_the_operators(action: str) -> None:
    need = ACTIONS[action]
    assert need in {*get_args(Scope), "any key", "operator"}
    for scope in SCOPES:
        opens = need == "any key" or scope in {need, "admin"}
        assert await allowed(key(scope), action) is (opens and need != "operator"), scope
        assert await allowed(key(scope, tenant="default"), action) is opens, scope


async def test_a_refusal_says_how_to_get_a_key() -> None:
    with pytest.raises(PermissionDeniedError, match="tenora keys create --tenant acme --scope train"):
        await Access().check(key("infer"), "files.create")
    with pytest.raises(PermissionDeniedError, match="Only the operator"):
        await Access().check(key("admin"), "adapters.load")


async def test_hooks_are_told_of_every_attempt_with_its_outcome() -> None:
    told: list[Attempt] = []

    async def hook(attempt: Attempt) -> None:
        told.append(attempt)

    access, caller = Access(), key("infer")
    access.hooks.append(hook)
    await access.check(caller, "models.read", "desk")
    with pytest.raises(PermissionDeniedError):
        await access.check(caller, "files.delete", "file-1")
    assert told == [
        Attempt(caller, "models.read", "desk", allowed=True),
        Attempt(caller, "files.delete", "file-1", allowed=False),
    ]


async def test_a_hook_can_refuse_what_the_key_allows() -> None:
    async def quota(attempt: Attempt) -> None:
        raise RateLimitedError("Enough for today.")

    access = Access()
    access.hooks.append(quota)
    with pytest.raises(RateLimitedError):
        await access.check(key("infer"), "chat.create")
