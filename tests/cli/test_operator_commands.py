"""tenora tenants and keys: asked of a server that runs, else done on the database of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenora.cli import registry
from tenora.cli.connection import SERVER_FILE
from tests.cli.conftest import Shell

Invoke = Callable[..., Any]


@pytest.fixture
def operator(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A command line with the operator's key."""
    monkeypatch.setenv("TENORA_API_KEY", shell.service.keys["default"]["admin"])
    return shell


@pytest.fixture
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is out of reach, as for a server on another machine."""

    def refuse(_work: object) -> None:
        pytest.fail("a command went to the database though a server runs")

    monkeypatch.setattr(registry, "on_registry", refuse)


@pytest.mark.usefixtures("no_database")
async def test_tenants_and_keys_are_asked_of_the_server(operator: Shell) -> None:
    assert "acme is created" in await operator.ok("tenants", "create", "acme")
    assert "acme has the weight 2.5" in await operator.ok("tenants", "update", "acme", "--weight", "2.5")
    assert "2.5" in await operator.ok("tenants", "list")
    assert "0.01" in (await operator("tenants", "update", "acme", "--weight", "0")).output
    of_acme = ("--tenant", "acme")
    secret = (await operator.ok("keys", "create", *of_acme, "--scope", "train", "--expires-days", "1")).strip()
    client = operator.service.client_with(secret)
    assert (await client.get("/v1/files")).status_code == 200
    listed = await operator.ok("keys", "list", *of_acme)
    assert ("train" in listed, secret in listed) == (True, False)
    key_id = listed.splitlines()[1].split()[0]
    assert f"{key_id} is revoked" in await operator.ok("keys", "revoke", key_id, *of_acme)
    assert (await client.get("/v1/files")).status_code == 401
    wrong = await operator("keys", "create", *of_acme, "--scope", "everything")
    assert (wrong.exit_code, "scopes" in wrong.stderr) == (1, True)


@pytest.mark.usefixtures("no_database")
async def test_a_tenant_is_deleted_once_that_was_confirmed(operator: Shell) -> None:
    asked = await operator("tenants", "delete", "other", stdin="n\n")
    assert (asked.exit_code, "Delete other" in asked.stderr) == (1, True)
    assert (await operator.service.control.tenants.get("other")).name == "other"
    assert "other is deleted" in await operator.ok("tenants", "delete", "other", "--yes")
    gone = await operator("tenants", "delete", "other", stdin="y\n")
    assert (gone.exit_code, "other" in gone.stderr, "Delete" in gone.stderr) == (1, True, False)
    kept = await operator("tenants", "delete", "default", "--yes")
    assert (kept.exit_code, "stays" in kept.stderr) == (1, True)


@pytest.mark.usefixtures("no_database")
async def test_a_key_that_is_not_the_operators_is_refused(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_API_KEY", shell.service.keys["other"]["admin"])
    refused = await shell("tenants", "create", "acme")
    assert (refused.exit_code, refused.stderr.startswith("error: ")) == (1, True)


async def test_local_needs_no_key_though_a_server_runs(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_API_KEY", "tk-wrong-key-of-nobody")
    assert (await shell("tenants", "create", "acme")).exit_code == 1
    assert "acme is created" in await shell.ok("tenants", "create", "acme", "--local")
    assert (await shell.service.control.tenants.get("acme")).name == "acme"


def test_a_server_that_was_killed_leaves_the_database(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TENORA_URL", raising=False)
    monkeypatch.setenv("TENORA_HOME", str(tmp_path))
    monkeypatch.setenv("TENORA_API_KEY", "tk-some-key-of-mine")
    (tmp_path / SERVER_FILE).write_text(json.dumps({"url": "http://127.0.0.1:9"}))
    assert invoke("tenants", "create", "acme").exit_code == 0
    assert "acme" in invoke("tenants", "list").stdout
