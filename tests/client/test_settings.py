"""The client's types of settings are those of the service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tenora.training.settings import BY_THEMSELVES, SETTINGS
from tenora_client.params import JobParams
from tests.support.patience import PATIENCE


def test_the_types_are_fresh(repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "clients/python/scripts/settings.py"), "--check"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"run clients/python/scripts/settings.py {done.stderr}"


def test_every_setting_is_a_keyword_of_the_client() -> None:
    assert {*BY_THEMSELVES, *SETTINGS} <= set(JobParams.__annotations__)
