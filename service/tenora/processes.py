"""Children that do not outlive the process that started them.

`python -m tenora.processes PARENT MODULE [ARGUMENT …]` runs a module so, for programs that are not ours.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio.subprocess import Process  # a child's start does not wait for asyncio

__all__ = ["bound_to_parent", "describe_exit", "die_with_parent", "hand_over", "lower_priority"]

_AUTOGROUP = Path("/proc/self/autogroup")
_AUTOGROUP_TRIES, _AUTOGROUP_PAUSE = 20, 0.1  # Linux takes one change in a tenth of a second, of all processes together
_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent ends (Linux), also when that is killed itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def lower_priority(nice: int) -> None:
    """Add to this process's niceness, so that it leaves the processor to others where cores are short.

    Linux may weigh niceness only among the processes of one session, and sessions all alike (sched(7), "The autogroup
    feature"): the session is made as nice as the process, if this process leads it. Another's is not ours to slow down.

    Raises:
        OSError: the session cannot be made nicer.
    """
    total = os.nice(nice)
    if os.getsid(0) != os.getpid() or not _AUTOGROUP.exists():
        return
    for left in reversed(range(_AUTOGROUP_TRIES)):
        try:
            _AUTOGROUP.write_text(str(total))
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_AUTOGROUP_PAUSE)
        else:
            return


def bound_to_parent(module: str, *arguments: str) -> list[str]:
    """The command that runs `python -m module arguments…` as a child that ends with this process."""
    return [sys.executable, "-m", "tenora.processes", str(os.getpid()), module, *arguments]


async def hand_over(process: Process, message: bytes) -> None:
    """Write what a child reads from its standard input, and close that. A child that is dead already is no error."""
    if process.stdin is None:
        raise OSError("the child has no standard input")
    try:
        process.stdin.write(message)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
    except (BrokenPipeError, ConnectionResetError):
        return  # its end is seen by whoever waits for it


def describe_exit(code: int) -> str:
    """How a child ended, in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def main(arguments: list[str]) -> None:
    """Run a module in this process, unless the parent is gone already."""
    parent, module, *rest = arguments
    die_with_parent()
    if os.getppid() != int(parent):
        sys.exit(1)  # it died before the line above
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
