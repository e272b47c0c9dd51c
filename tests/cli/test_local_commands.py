"""Commands that need no server: tenants, keys, doctor, pull, settings."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenora import __version__
from tenora.cli import doctor
from tenora.cli.connection import SERVER_FILE, local_url
from tenora.cli.options import SECRET, load_settings, settings_parameters, variable
from tenora.cli.serving import listening, url_of
from tenora.config import Settings
from tenora.control.tenancy.bootstrap import Registry
from tenora.errors import ConfigurationError
from tests.support.patience import PATIENCE

Invoke = Callable[..., Any]


def test_tenants_and_keys(invoke: Invoke) -> None:
    assert invoke("tenants", "create", "acme").exit_code == 0
    again = invoke("tenants", "create", "acme")
    assert (again.exit_code, again.stderr.startswith("error: ")) == (1, True)
    assert "acme" in invoke("tenants", "list").stdout
    assert "acme has the weight 0.5" in invoke("tenants", "update", "acme", "--weight", "0.5").stdout
    assert invoke("tenants", "update", "acme", "--weight", "nan").exit_code == 1
    made = invoke("keys", "create", "--tenant", "acme", "--scope", "infer", "--scope", "train", "--expires-days", "1")
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert secret.startswith("tk-")
    assert secret not in made.stderr
    principal = asyncio.run(authenticate(secret))
    assert (principal.tenant, principal.scopes) == ("acme", {"infer", "train"})
    listed = invoke("keys", "list", "--tenant", "acme").stdout
    assert "infer,train" in listed
    assert secret not in listed
    key_id = listed.splitlines()[1].split()[0]
    assert "is revoked" in invoke("keys", "revoke", key_id, "--tenant", "acme").stdout
    assert invoke("keys", "create", "--tenant", "acme", "--scope", "everything").exit_code == 1
    for days in ("inf", "nan", "0", "1e15"):
        wrong = invoke("keys", "create", "--tenant", "acme", "--scope", "infer", "--expires-days", days)
        assert (wrong.exit_code, "--expires-days" in wrong.stderr) == (2, True), days
    assert invoke("keys", "list", "--tenant", "nobody").exit_code == 1


async def authenticate(secret: str) -> Any:
    registry = await Registry.open(load_settings())
    try:
        return await registry.keys.authenticate(secret)
    finally:
        await registry.close()


def test_every_setting_is_a_flag_with_its_variable(invoke: Invoke) -> None:
    names = {parameter.name for parameter in settings_parameters()}
    assert names == set(Settings.model_fields) - SECRET
    shown = " ".join(invoke("serve", "--help", env={"COLUMNS": "400"}).stdout.split())
    for name in names:
        assert f"--{name.replace('_', '-')}" in shown
        assert variable(name) in shown
    assert "api-key" not in shown


@pytest.mark.parametrize("group", [(), ("adapters",), ("tenants",), ("bench",)])
def test_every_command_is_listed_with_its_whole_sentence(invoke: Invoke, group: tuple[str, ...]) -> None:
    listed = invoke(*group, "--help", env={"COLUMNS": "80"}).stdout
    assert "..." not in listed.partition("Commands:")[2]


def test_a_flag_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_PORT", "1234")
    assert load_settings().port == 1234
    assert load_settings(port=4321, model=None).port == 4321


@pytest.mark.parametrize(("name", "value"), [("PORT", "99999"), ("DEVICE", "abacus"), ("ADAPTER_DIRS", '["/a"')])
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"TENORA_{name}", value)
    with pytest.raises(ConfigurationError, match=name):
        load_settings()


def test_doctor_on_a_fresh_machine(invoke: Invoke) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    topics = {line.split()[1] for line in lines if not line.startswith(" ")}
    assert {"python", "torch", "device", "memory", "disk", "model", "database", "key", "server"} <= topics
    assert any("tenora pull" in line for line in lines)


def test_doctor_finds_what_is_wrong(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, device="cuda", dtype="bfloat16", kv_cache_bytes=2**60, model=str(tmp_path))
    assert doctor.check_device(settings, {"cuda": [], "cpu": "AVX2"}).verdict == "bad"
    assert doctor.check_memory(settings).verdict == "bad"
    assert doctor.check_model(settings).verdict == "bad"
    (tmp_path / "credentials").write_text("x")
    (tmp_path / "credentials").chmod(0o644)
    assert doctor.check_credentials(settings).verdict == "bad"
    (tmp_path / "credentials").chmod(0o600)
    assert doctor.check_credentials(settings).verdict == "ok"
    (tmp_path / "tenora.db").write_bytes(b"not a database at all" * 100)
    assert doctor.check_database(settings).verdict == "bad"
    assert doctor.check_disk(settings).verdict in {"ok", "note"}


def test_pull_of_an_unknown_model_lists_what_there_is(invoke: Invoke) -> None:
    result = invoke("pull", "no-such-model")
    assert result.exit_code == 1
    assert "smollm2-135m" in result.stderr


def test_pull_of_a_directory_says_where_it_is(invoke: Invoke, tiny_base: Path) -> None:
    assert str(tiny_base) in invoke("pull", str(tiny_base)).stdout


def test_no_server_is_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TENORA_API_KEY", "tk-x")
    result = invoke("jobs", "list")
    assert (result.exit_code, result.stderr.startswith("error: ")) == (1, True)
    monkeypatch.delenv("TENORA_API_KEY")
    assert "No API key" in invoke("jobs", "list").stderr


def test_the_servers_own_note_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_HOME", str(tmp_path))
    assert local_url() is None
    (tmp_path / SERVER_FILE).write_text('{"url": "http://127.0.0.1:1234"}')
    assert local_url() == "http://127.0.0.1:1234"
    (tmp_path / SERVER_FILE).write_text('["half')
    assert local_url() is None


def test_a_taken_port_is_told_before_the_model_is_loaded() -> None:
    with listening(Settings(port=0)) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigurationError, match="--port"), listening(Settings(port=port)):
            pass


def test_python_m_tenora(tmp_path: Path) -> None:
    environ = {**os.environ, "TENORA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tenora", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environ,
        check=True,
    )
    assert done.stdout.strip() == f"tenora {__version__}"
