"""The table of settings in service/README.md is what `tenora.config.Settings` says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tenora.config import Settings

MIB = 2**20


def default(name: str, value: Any) -> str:
    """A default as the table writes it."""
    if value is None:
        return "unset"
    if name.endswith("_bytes") and value % MIB == 0:
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
