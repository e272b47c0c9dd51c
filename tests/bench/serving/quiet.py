"""How busy others keep the machine while something is measured."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Self

import psutil

NOISY = 0.1
"""Cores. With two threads that wait for each other, one busy neighbour costs a peer far more than its share."""


class Quiet:
    """Measures, over a block, the cores that processes outside this program's tree kept busy: `foreign`."""

    def __init__(self) -> None:
        self.foreign = 0.0
        self._started = self._all = self._own = 0.0

    def __enter__(self) -> Self:
        self._started, self._all, self._own = time.monotonic(), busy_seconds(), own_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._started
        foreign = busy_seconds() - self._all - (own_seconds() - self._own)
        self.foreign = max(0.0, foreign / seconds) if seconds else 0.0


def busy_seconds() -> float:
    """Processor seconds of the whole machine since it started, all cores together."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def own_seconds() -> float:
    """Processor seconds of this process and all that descend from it, those included that ended and were waited for."""
    root = psutil.Process()
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
