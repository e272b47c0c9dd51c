"""Keeps an engine running: starts it, replaces it when it dies, ends it. Free of torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from tenora.engine.link import Link
from tenora.engine.messages import Command, Event, Loading, Ready, Shutdown, StartFailed
from tenora.errors import ConfigurationError, TenoraError, UnavailableError, UnsupportedModelError

_log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.1, 30.0)  # first and longest pause before a restart; it doubles in between
STABLE_SECONDS = 60.0  # after this long the next death counts as the first
EXIT_SECONDS = 10.0  # what a told-to-end engine is given for saving the state of training runs

_START_ERRORS: dict[str | None, type[TenoraError]] = {
    kind.code: kind for kind in (UnsupportedModelError, ConfigurationError)
}


class EngineKeeper:
    """One engine after another, until `close`.

    Attributes:
        ready: what the engine said when it was loaded; the last one's while a new one starts.
        up: set while an engine is loaded and running.
        closing: set once `close` was called, or the first start failed.
        last_heard: `time.monotonic()` of the last event, or of the start of an engine that has sent none.
        loading: how far an engine is that is not loaded yet; None before its first word and once it is.
        restarts: how often a dead engine was replaced.
        link: the line to the present incarnation.
    """

    def __init__(
        self,
        make_link: Callable[[], Link],
        *,
        on_event: Callable[[Event], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`on_event` gets every event; `on_lost` is called when an engine is gone, after its last event."""
        self.ready: Ready | None = None
        self.up = asyncio.Event()
        self.closing = asyncio.Event()
        self.last_heard = 0.0
        self.loading: Loading | None = None
        self.restarts = 0
        self.link: Link | None = None
        self._make_link = make_link
        self._on_event = on_event
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None

    async def start(self, seconds: float) -> None:
        """Start the first engine and wait until it is loaded, however long that takes while it gets on.

        Raises:
            UnsupportedModelError, ConfigurationError: it cannot serve this model with these settings.
            UnavailableError: it died, or told of no progress for `seconds`.
        """
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name="engine-keeper")
        self.last_heard = time.monotonic()
        try:
            await self._progressing(self._first, seconds)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Tell the engine to end, wait for it, and kill it if it does not within `EXIT_SECONDS`."""
        self.closing.set()
        task, self._task = self._task, None
        if task is None:
            return
        if self.link is not None:
            self.link.send(Shutdown()) if self.up.is_set() else self.link.kill()
        done, _ = await asyncio.wait([task], timeout=EXIT_SECONDS)
        if not done and self.link is not None:
            self.link.kill()
            done, _ = await asyncio.wait([task], timeout=EXIT_SECONDS)
        if not done:
            task.cancel()
            await asyncio.wait([task])

    def send(self, command: Command) -> None:
        """Send to the engine if there is one; what it had to do with is over otherwise."""
        if self.up.is_set() and self.link is not None:
            self.link.send(command)

    async def _keep(self) -> None:
        pause, longest = BACKOFF_SECONDS
        while True:
            started = time.monotonic()
            reason = await self._live_once()
            if self.closing.is_set():
                return
            if self._first is not None and not self._first.done():
                self._first.set_exception(UnavailableError(f"The engine ended while starting: {reason}. See its log."))
                return
            if time.monotonic() - started > STABLE_SECONDS:
                pause = BACKOFF_SECONDS[0]
            _log.error("engine ended; restarting it", extra={"reason": reason, "seconds": pause})
            if await self._closes_within(pause):
                return
            pause = min(pause * 2, longest)
            self.restarts += 1

    async def _live_once(self) -> str:
        """One incarnation from start to end; says how it ended."""
        self.link = link = self._make_link()
        try:
            await link.open(self._receive)
            return await link.closed()
        except OSError as error:
            return f"it could not be started: {error}"
        finally:
            link.kill()
            self.link = None
            self.loading = None
            self.up.clear()
            self._on_lost()

    async def _progressing(self, loaded: asyncio.Future[None], seconds: float) -> None:
        """Wait for `loaded` for as long as the engine says something every `seconds`."""
        while not loaded.done():
            silent = time.monotonic() - self.last_heard
            if silent >= seconds:
                raise UnavailableError(
                    f"The engine made no progress for {seconds:g} s while it loaded ({self._doing()}); see its log, or "
                    "raise TENORA_ENGINE_START_SECONDS."
                )
            await asyncio.wait([loaded], timeout=seconds - silent)
        loaded.result()

    def _doing(self) -> str:
        """What an engine that is not loaded said last."""
        step = self.loading
        return "before its first word" if step is None else f"at {step.phase}, {step.done} of {step.total}"

    async def _closes_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self.closing.wait()
        except TimeoutError:
            return False

    def _receive(self, event: Event) -> None:
        self.last_heard = time.monotonic()
        if isinstance(event, Loading):
            self.loading = event
        first = self._first if self._first is not None and not self._first.done() else None
        if isinstance(event, Ready):
            self.ready = event
            self.loading = None
            self.up.set()
            if first is not None:
                first.set_result(None)
        elif isinstance(event, StartFailed):
            _log.error("engine could not start", extra={"code": event.code, "reason": event.message})
            if first is not None:
                self.closing.set()  # another try would fail as well
                first.set_exception(_START_ERRORS.get(event.code, UnavailableError)(event.message))
        self._on_event(event)
