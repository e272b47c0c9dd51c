"""The programs that check deployment files, fetched through `make tools`, and the chart rendered by them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.patience import PATIENCE


@dataclass(frozen=True)
class Tools:
    """Paths of the checkers."""

    helm: Path
    hadolint: Path
    kubernetes_validate: Path


@pytest.fixture(scope="session")
def tools(repo_root: Path) -> Tools:
    """The checkers; fetched if they are not there, which needs the package index."""
    found = Tools(
        repo_root / ".tools/bin/helm",
        repo_root / ".tools/venv/bin/hadolint",
        repo_root / ".tools/venv/bin/kubernetes-validate",
    )
    if all(path.exists() for path in (found.helm, found.hadolint, found.kubernetes_validate)):
        return found
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") and shutil.which("helm") is None:
        pytest.skip("the package index has helm for x86-64 Linux only, and there is none on the PATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        ["make", "tools"], cwd=repo_root, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if made.returncode != 0:
        pytest.fail(f"make tools failed:\n{made.stdout}\n{made.stderr}")
    return found


Helm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def chart(repo_root: Path) -> Path:
    """The chart's directory."""
    return repo_root / "deploy/helm/tenora"


@pytest.fixture(scope="session")
def helm(tools: Tools, chart: Path) -> Helm:
    """`helm(verb, values="values-cpu.yaml", set=["a=b"])` -> the finished process of `helm verb` on the chart."""

    def run(verb: str, *, values: str = "", set: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:  # noqa: A002  helm's own flag
        name = ["tenora"] if verb == "template" else []
        flags = [*(["--values", str(chart / values)] if values else []), *(f"--set={item}" for item in set)]
        command = [str(tools.helm), verb, *name, str(chart), "--kube-version=1.37", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., dict[str, dict[str, Any]]]:
    """`render(values=…, set=…)` -> the chart's resources by kind."""

    def run(*, values: str = "", set: Sequence[str] = ()) -> dict[str, dict[str, Any]]:  # noqa: A002  helm's own flag
        done = helm("template", values=values, set=set)
        if done.returncode != 0:
            pytest.fail(done.stderr)
        return {resource["kind"]: resource for resource in yaml.safe_load_all(done.stdout) if resource}

    return run
