"""What a process makes of itself, seen from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LOWERED = """
import os
from pathlib import Path
from tenora.processes import lower_priority
def session(): return int(Path("/proc/self/autogroup").read_text().split()[-1])
before = os.nice(0), session()
lower_priority(3)
print(os.nice(0) - before[0], session() - before[1], os.nice(0) - session())
"""
needs_autogroups = pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="Linux groups no sessions here")


def lowered(*, leads_session: bool) -> list[int]:
    """How much nicer the process and its session became, and by how much they differ."""
    program = [sys.executable, "-c", LOWERED]
    # Either way a session of its own: not every process is in one that Linux has grouped.
    command = program if leads_session else ["sh", "-c", '"$@"; exit $?', "leader", *program]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, start_new_session=True)
    return [int(word) for word in done.stdout.split()]


@needs_autogroups
def test_the_session_that_a_process_leads_becomes_as_nice_as_the_process() -> None:
    process, _, difference = lowered(leads_session=True)
    assert (process, difference) == (3, 0)


@needs_autogroups
def test_a_session_that_others_lead_is_left_as_it_is() -> None:
    process, session, _ = lowered(leads_session=False)
    assert (process, session) == (3, 0)
