"""Children that do not outlive the process that started them.

`python -m tenora.processes PARENT MODULE [ARGUMENT …]` runs a module so, for programs that are not ours.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

__all__ = ["bound_to_parent", "die_with_parent"]

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent ends (Linux), also when that is killed itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def bound_to_parent(module: str, *arguments: str) -> list[str]:
    """The command that runs `python -m module arguments…` as a child that ends with this process."""
    return [sys.executable, "-m", "tenora.processes", str(os.getpid()), module, *arguments]


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
