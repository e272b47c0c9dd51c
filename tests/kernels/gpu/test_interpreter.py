"""The kernels in Triton's interpreter: no GPU, and nothing of it in this process.

Triton decides when it is first imported whether functions are compiled or interpreted, and the AOT tests compile them.
So the checks run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.full import full

CHECKS = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))


@pytest.mark.timeout(3600)  # a busy machine makes it slow, not red
@pytest.mark.parametrize("chosen", ["not full", full("full")])
def test_in_the_interpreter(chosen: str, repo_root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "-m", chosen, *map(str, CHECKS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.findall(r"^PASSED \S*?(check_\w+)\.py::", done.stdout, re.MULTILINE)
    if chosen == "not full":
        assert min(passed.count(path.stem) for path in CHECKS) >= 2, done.stdout[-2000:]
    assert len(passed) >= 50, done.stdout[-2000:]
