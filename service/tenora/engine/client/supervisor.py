"""Keeps an engine running: starts it, replaces it when it dies or hangs, ends it. Free of torch."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from tenora.backoff import Backoff, is_set_within
from tenora.engine.client.link import Link
from tenora.engine.messages import Command, Event, Loading, Ready, Shutdown, StartFailed
from tenora.errors import ConfigurationError, TenoraError, UnavailableError, UnsupportedModelError

_log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.1, 30.0)  # first and longest pause before a restart; it doubles in between
STABLE_SECONDS = 60.0  # after this long the next death counts as the first
EXIT_SECONDS = 10.0  # what a told-to-end engine is given for saving the state of training runs
LOOK_SECONDS = 1.0  # between two looks at whether the engine still says something, at most

_START_ERRORS: dict[str | None, type[TenoraError]] = {
    kind.code: kind for kind in (UnsupportedModelError, ConfigurationError)
}


class EngineSupervisor:
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
        hang_seconds: float,
    ) -> None:
        """`on_event` gets every event; `on_lost` is called when an engine is given up or gone, after its last event.

        A loaded engine that says nothing for `hang_seconds` is given up.
        """
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
        self._hang_seconds = hang_seconds
        self._start_seconds = math.inf
        self._given_up: str | None = None  # why the present engine is, which may not be gone yet
        self._away_since = 0.0  # when the last one that was loaded was lost
        self._failed_starts = 0  # since an engine was loaded
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None

    async def start(self, seconds: float) -> None:
        """Start the first engine and wait until it is loaded, however long that takes while it gets on.

        From then on an engine that does not get on for `seconds` while it loads is given up.

        Raises:
            UnsupportedModelError, ConfigurationError: it cannot serve this model with these settings.
            UnavailableError: it died, or told of no progress for `seconds`.
        """
        self._start_seconds = seconds
        self._away_since = time.monotonic()
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name="engine-supervisor")
        try:
            await asyncio.shield(self._first)
        except BaseException:
            await self.close()
            raise

    @property
    def trouble(self) -> str | None:
        """What only a new process of the whole service can help against; None if there is nothing of that kind.

        An engine that died, or hung and could be killed, is replaced; that is none.
        """
        silent = time.monotonic() - self.last_heard
        if self._given_up or (self.up.is_set() and silent >= self._hang_seconds):
            return "engine hangs"
        if self._failed_starts and time.monotonic() - self._away_since >= self._start_seconds:
            return "engine does not come back"
        return None

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
        backoff = Backoff(*BACKOFF_SECONDS, STABLE_SECONDS)
        while True:
            started = time.monotonic()
            reason = await self._live_once()
            lived = self.last_heard - started  # what it hung for is no life
            if self.closing.is_set():
                return
            if self._first is not None and not self._first.done():
                self._first.set_exception(UnavailableError(f"The engine ended while starting: {reason}. See its log."))
                return
            pause = backoff.after(lived)
            _log.error("engine ended; restarting it", extra={"reason": reason, "seconds": pause})
            if await is_set_within(self.closing, pause):
                return
            self.restarts += 1

    async def _live_once(self) -> str:
        """One incarnation from start to end; says how it ended."""
        self.link = link = self._make_link()
        self.last_heard = time.monotonic()
        watch = asyncio.create_task(self._watch(link), name="engine-watch")
        try:
            await link.open(self._receive)
            ended = await link.closed()
        except OSError as error:
            return f"it could not be started: {error}"
        else:
            return self._given_up or ended
        finally:
            watch.cancel()
            link.kill()
            self._lose()
            self.link = None
            self._given_up = None

    def _lose(self) -> None:
        """Nobody may wait for the present engine any longer."""
        if self.up.is_set():
            self._away_since = time.monotonic()
        elif self._given_up is None:
            self._failed_starts += 1
        self.loading = None
        self.up.clear()
        self._on_lost()

    async def _watch(self, link: Link) -> None:
        """Give the engine up when it says nothing for too long."""
        heard, silent = self.last_heard, 0.0
        while True:
            limit = self._hang_seconds if self.up.is_set() else self._start_seconds
            pause = min(limit / 10, LOOK_SECONDS)
            began = time.monotonic()
            await asyncio.sleep(pause)
            if self.last_heard != heard:
                heard, silent = self.last_heard, 0.0
                continue
            # A loop that stood still itself (a stopped process, say) has not read what the engine said meanwhile.
            silent += min(time.monotonic() - began, 2 * pause)
            if silent >= limit:
                self._give_up(link, limit)
                return

    def _give_up(self, link: Link, seconds: float) -> None:
        if self.up.is_set():
            reason = f"it gave no sign of life for {seconds:g} s"
        else:
            reason = f"it made no progress for {seconds:g} s while it loaded ({self._doing()})"
        if self._first is not None and not self._first.done():
            message = f"The engine could not start: {reason}; see its log, or raise TENORA_ENGINE_START_SECONDS."
            self._first.set_exception(UnavailableError(message))
            self.closing.set()
        self._lose()
        self._given_up = reason
        link.kill()

    def _doing(self) -> str:
        """What an engine that is not loaded said last."""
        step = self.loading
        return "before its first word" if step is None else f"at {step.phase}, {step.done} of {step.total}"

    def _receive(self, event: Event) -> None:
        if self._given_up is not None:
            return
        self.last_heard = time.monotonic()
        if isinstance(event, Loading):
            self.loading = event
        first = self._first if self._first is not None and not self._first.done() else None
        if isinstance(event, Ready):
            self.ready = event
            self.loading = None
            self._failed_starts = 0
            self.up.set()
            if first is not None:
                first.set_result(None)
        elif isinstance(event, StartFailed):
            _log.error("engine could not start", extra={"code": event.code, "reason": event.message})
            if first is not None:
                self.closing.set()  # another try would fail as well
                first.set_exception(_START_ERRORS.get(event.code, UnavailableError)(event.message))
        self._on_event(event)
