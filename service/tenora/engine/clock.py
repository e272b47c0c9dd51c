"""What work costs the device that does it. On a GPU the host only enqueues; its own time says nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Times a stretch of work that comes in pieces."""

    def start(self) -> None:
        """A stretch begins now."""
        ...

    def lap(self) -> float:
        """Seconds of the device since the start; to be called after every piece, which need not have ended."""
        ...

    def stop(self) -> float:
        """Seconds of the device since the start; waits for everything that was enqueued."""
        ...


class HostClock:
    """Of a device that has done a piece of work when the call returns."""

    def __init__(self) -> None:
        self._started = 0.0

    def start(self) -> None:
        """See `Clock`."""
        self._started = time.monotonic()

    def lap(self) -> float:
        """See `Clock`."""
        return time.monotonic() - self._started

    def stop(self) -> float:
        """See `Clock`."""
        return self.lap()


class Mark(Protocol):
    """A place in what a device was given to do; `torch.cuda.Event`."""

    def record(self) -> None:
        """Here."""
        ...

    def synchronize(self) -> None:
        """Wait until the device is there."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds of the device from here to another mark, both reached."""
        ...


class DeviceClock:
    """Of a device that works behind the host, by a mark after every piece.

    A lap waits for the piece before the last one: the device always has a piece to do, and the host is never so far
    ahead that a stretch could not be ended in time. The pieces under way are counted as long as those that were seen.
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        """`mark` makes one, which is not anywhere yet."""
        self._mark = mark
        self._first = mark()
        self._under_way: deque[Mark] = deque()
        self._seen, self._laps = 0.0, 0

    def start(self) -> None:
        """See `Clock`."""
        self._under_way.clear()
        self._seen, self._laps = 0.0, 0
        self._first = self._place()

    def lap(self) -> float:
        """See `Clock`."""
        self._under_way.append(self._place())
        if len(self._under_way) > 1:
            self._reach()
        return self._seen + len(self._under_way) * self._seen / max(self._laps, 1)

    def stop(self) -> float:
        """See `Clock`."""
        while self._under_way:
            self._reach()
        return self._seen

    def _place(self) -> Mark:
        mark = self._mark()
        mark.record()
        return mark

    def _reach(self) -> None:
        """Wait for the oldest piece under way."""
        mark = self._under_way.popleft()
        mark.synchronize()
        self._seen, self._laps = self._first.elapsed_time(mark) / 1000, self._laps + 1


def clock_of(device: torch.device) -> Clock:
    """That of a device."""
    if device.type != "cuda":
        return HostClock()
    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]  # torch
