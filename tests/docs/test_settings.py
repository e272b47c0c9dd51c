"""The table of settings in service/README.md is what `tenora.config.Settings` says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tenora.config import Settings

MIB = 2**20


def default(name: str, value: Any) -> str:
    """A default as the table writes it."""
    if value is None:
        return "unset"
    if name.endswith("_bytes") and value and value % MIB == 0:
        return f"{value} ({value // MIB} MiB)"
    if value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table() -> str:
    """The table as it should be."""
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `TENORA_{name.upper()}` | {default(name, field.default)} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_every_setting_is_in_the_table_as_it_is(repo_root: Path) -> None:
    text = (repo_root / "service/README.md").read_text()
    written = re.search(r"^\| variable .*\n(?:\|.*\n)*", text, re.MULTILINE)
    assert written is not None
    assert written.group() == table()


def test_no_variable_is_named_that_does_not_exist(repo_root: Path) -> None:
    """Anywhere in the documents. Those that are no settings are the clients' and the tests'."""
    others = {"TENORA_URL", "TENORA_FAILPOINTS", "TENORA_"}
    known = {f"TENORA_{name.upper()}" for name in Settings.model_fields} | others
    for document in ("README.md", "service/README.md", "CHANGELOG.md", "clients/python/README.md", "Dockerfile"):
        named = set(re.findall(r"\bTENORA_[A-Z_]*", (repo_root / document).read_text()))
        assert named <= known, document


@pytest.mark.parametrize(
    ("text", "directories"),
    [
        ("/srv/adapters", ["/srv/adapters"]),
        (f"/srv/a{os.pathsep}~/b c{os.pathsep}", ["/srv/a", "~/b c"]),
        ('["/srv/a", "/srv/[b]"]', ["/srv/a", "/srv/[b]"]),
        ("", []),
        ("[]", []),
    ],
)
def test_adapter_dirs_are_a_path_list(text: str, directories: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_ADAPTER_DIRS", text)
    settings = Settings()
    assert settings.adapter_dirs == tuple(map(Path, directories))
    # As the engine's process gets them.
    assert Settings(**settings.model_dump(mode="json")).adapter_dirs == settings.adapter_dirs


def test_adapter_dirs_that_begin_as_json_must_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENORA_ADAPTER_DIRS", '["/srv/a"')
    with pytest.raises(ValidationError, match="adapter_dirs"):
        Settings()
