"""Where the address and the key come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenora_client import Client, ConfigurationError
from tenora_client.environment import resolve_key, resolve_url


@pytest.mark.parametrize(
    ("argument", "environ", "expected"),
    [
        (None, {}, "http://127.0.0.1:8000"),
        (None, {"TENORA_URL": "http://gpu:9000/"}, "http://gpu:9000"),
        ("https://tenora.example/v1/", {"TENORA_URL": "http://gpu:9000"}, "https://tenora.example"),
        ("http://host/prefix/v1", {}, "http://host/prefix"),
    ],
)
def test_the_address(argument: str | None, environ: dict[str, str], expected: str) -> None:
    assert resolve_url(argument, environ) == expected


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigurationError, match="http://host:port"):
        resolve_url(address, {})


def test_the_key_prefers_argument_then_variable_then_file(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("tk-file\n")
    environ = {"TENORA_HOME": str(tmp_path), "TENORA_API_KEY": "tk-variable"}
    assert resolve_key("tk-argument", environ) == "tk-argument"
    assert resolve_key(None, environ) == "tk-variable"
    assert resolve_key(None, {"TENORA_HOME": str(tmp_path)}) == "tk-file"


def test_no_key_says_where_one_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TENORA_API_KEY"):
        resolve_key(None, {"TENORA_HOME": str(tmp_path)})


def test_a_key_that_cannot_travel_in_a_header() -> None:
    with pytest.raises(ConfigurationError, match="characters"):
        resolve_key("tk-a\nX-Other: b", {})


def test_the_client_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_URL", "http://somewhere:1/v1")
    monkeypatch.setenv("TENORA_API_KEY", "tk-x")
    with Client() as client:
        assert client.base_url == "http://somewhere:1"
