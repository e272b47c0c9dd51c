"""The Dockerfile: accepted by hadolint, runs as nobody in particular, and carries only what it needs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import Tools


def lint(tools: Tools, dockerfile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(tools.hadolint), "--no-color", str(dockerfile)], capture_output=True, text=True, check=False
    )


def test_hadolint_accepts_it(tools: Tools, repo_root: Path) -> None:
    done = lint(tools, repo_root / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_hadolint_notices_a_mistake(tools: Tools, repo_root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "Dockerfile"
    text = (repo_root / "Dockerfile").read_text().replace("USER 10001:10001", "USER root")
    copy.write_text(text)
    done = lint(tools, copy)
    assert done.returncode != 0
    assert "DL3002" in done.stdout


def test_every_exception_has_its_reason_above_it(repo_root: Path) -> None:
    lines = (repo_root / "Dockerfile").read_text().splitlines()
    exceptions = [number for number, line in enumerate(lines) if line.startswith("# hadolint ignore")]
    assert exceptions
    for number in exceptions:
        assert lines[number - 1].startswith("# "), f"line {number + 1} gives no reason"


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_each_variant_of_the_chart_is_a_stage(repo_root: Path, variant: str) -> None:
    assert f"AS runtime-{variant}\n" in (repo_root / "Dockerfile").read_text()


def test_the_build_context_holds_nothing_that_is_not_named(repo_root: Path) -> None:
    lines = (repo_root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {
        word
        for line in (repo_root / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == {rule[1:] for rule in rules if rule.startswith("!")}
