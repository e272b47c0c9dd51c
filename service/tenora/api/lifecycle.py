"""Whether the server takes requests, and which are still open: what a graceful end needs to know."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from tenora.errors import UnavailableError


class Lifecycle:
    """Serving, then draining (no new requests, open ones finish), then expired (open ones are cut off with an error).

    Attributes:
        draining: new requests are refused.
        expired: set when the grace is over; a waiting request ends with an error, a stream with an error event.
        open: requests that are being served, probes not counted.
    """

    def __init__(self) -> None:
        self.draining = False
        self.expired = asyncio.Event()
        self.open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Count one request as open for as long as the block runs."""
        self.open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.open -= 1
            if self.open == 0:
                self._idle.set()

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    async def drained(self, seconds: float) -> bool:
        """Wait until no request is open; after `seconds` cut the remaining ones off and return False."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self.expired.set()
            return False
        return True

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()

    def shutting_down(self) -> UnavailableError:
        """The error of a request that meets a server on its way out."""
        return UnavailableError(
            "The server is shutting down. Repeat the request; another server answers it.", code="shutting_down"
        )
