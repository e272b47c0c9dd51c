"""A loop whose clock jumps instead of waiting, so that a test of long times is over at once on any machine."""

from __future__ import annotations

import asyncio
import selectors


class Clock(selectors.DefaultSelector):
    """Where a loop would wait, its clock jumps. Nothing from other threads or processes may be waited for.

    Attributes:
        now: seconds since the loop was made.
    """

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop on a `Clock`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        super().__init__(clock)

    def time(self) -> float:
        return self._clock.now
