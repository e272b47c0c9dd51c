"""The kernels in Triton's interpreter: no GPU, and nothing of it in this process.

Triton decides when it is first imported whether functions are compiled or interpreted, and the AOT tests compile them.
So each file of checks runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))


@pytest.mark.timeout(3600)  # a busy machine makes it slow, not red
@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_in_the_interpreter(path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= 6
