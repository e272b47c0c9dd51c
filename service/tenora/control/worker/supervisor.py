"""Keeps a worker running beside the service: starts it, replaces it when it dies, ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from tenora.backoff import Backoff, is_set_within
from tenora.control.worker.line import ServiceEnd
from tenora.environment import for_child
from tenora.processes import describe_exit, hand_over

_log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.1, 30.0)  # first and longest pause before a restart; it doubles in between
STABLE_SECONDS = 60.0  # after this long the next death counts as the first
EXIT_SECONDS = 20.0  # what a told-to-end worker is given for saving the state of its runs
LOOK_SECONDS = 0.5  # between two looks at whether the worker of a dead service has ended


class WorkerSupervisor:
    """One worker after another, until `close`.

    Attributes:
        restarts: how often a dead worker was replaced.
        pid: of the present worker; None if there is none.
    """

    def __init__(self, command: Sequence[str], launch: bytes, line: ServiceEnd, is_free: Callable[[], bool]) -> None:
        """Nothing is started before `start`.

        Args:
            command: the worker's program.
            launch: what it reads from its standard input: secrets have no place in a command line or an environment.
            line: to it.
            is_free: whether no worker holds the state directory.
        """
        self.restarts = 0
        self.pid: int | None = None
        self._command = command
        self._launch = launch
        self._line = line
        self._is_free = is_free
        self._closing = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; a worker is there some time later."""
        self._task = asyncio.create_task(self._keep(), name="worker-supervisor")

    async def close(self) -> None:
        """Have the worker save what runs and end, and kill it if it does not within `EXIT_SECONDS`."""
        self._closing.set()
        if self._task is None:
            return
        self._line.stop()
        if not self._line.connected.is_set():
            self.terminate()  # it is on its way to us
        done, _ = await asyncio.wait([self._task], timeout=EXIT_SECONDS)
        if not done:
            _log.warning("the worker does not end; it is killed")
            self.kill()
            await asyncio.wait([self._task])

    def terminate(self) -> None:
        """SIGTERM to the worker, if there is one."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the worker, if there is one."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _keep(self) -> None:
        backoff = Backoff(*BACKOFF_SECONDS, STABLE_SECONDS)
        while True:
            await self._wait_for_a_dead_services_worker()
            if self._closing.is_set():
                return
            started = time.monotonic()
            reason = await self._live_once()
            if self._closing.is_set():
                return
            pause = backoff.after(time.monotonic() - started)
            _log.error("the worker ended; restarting it", extra={"reason": reason, "seconds": pause})
            if await is_set_within(self._closing, pause):
                return
            self.restarts += 1

    async def _wait_for_a_dead_services_worker(self) -> None:
        told = False
        while not self._is_free():
            if not told:
                _log.info("the worker of a service that is gone finishes what it prepares; another one starts then")
                told = True
            if await is_set_within(self._closing, LOOK_SECONDS):
                return

    async def _live_once(self) -> str:
        """One worker from start to end; says how it ended."""
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                env=for_child(),
                start_new_session=True,  # the terminal's Ctrl-C is for the service, which decides when the worker ends
            )
        except OSError as error:
            return f"it could not be started: {error}"
        self.pid = process.pid
        try:
            await hand_over(process, self._launch)
            code = await process.wait()
        finally:
            self.pid = None
            if process.returncode is None:
                process.kill()
        return describe_exit(code)
