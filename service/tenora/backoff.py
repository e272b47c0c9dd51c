"""Pauses between tries of what keeps failing."""

from __future__ import annotations

import asyncio


class Backoff:
    """Each pause is twice as long as the one before, up to a longest one; after a life that was long enough, anew."""

    def __init__(self, first: float, longest: float, stable: float) -> None:
        """All in seconds; a life of more than `stable` makes the next pause the first one again."""
        self._first, self._longest, self._stable = first, longest, stable
        self._next = first

    def after(self, lived: float) -> float:
        """The pause, in seconds, after what has lived for so many seconds has ended; 0 if it never came to live."""
        pause = self._first if lived > self._stable else self._next
        self._next = min(2 * pause, self._longest)
        return pause


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for so long at most; whether it has come."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
