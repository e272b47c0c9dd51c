"""Threads for work as long as what a tenant sent: bounded, shared fairly, and left when nobody waits for the result."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tenora.errors import RateLimitedError, UnavailableError

T = TypeVar("T")
_PARTING_SECONDS = 0.2
Check = Callable[[], None]
"""Raises if nobody waits for the result any more. Work calls it as often as it can."""


class AbandonedError(Exception):
    """Nobody waits for the result of this work."""


class FairThread(threading.Thread):
    """A thread that the end of the process does not wait for."""


@dataclass(eq=False, slots=True)
class _Task:
    work: Callable[[Check], Any]
    future: asyncio.Future[Any]
    context: contextvars.Context
    abandoned: bool = False

    def check(self) -> None:
        if self.abandoned:
            raise AbandonedError


class FairThreads:
    """Some threads that take the share groups in turn, first come first served within one.

    Args:
        name: of the threads.
        threads: how many, started when they are needed.
        per_share_group: how many of them one share group may occupy; None is all.
        most_waiting: tasks of one share group that may wait.
    """

    def __init__(self, name: str, threads: int, *, per_share_group: int | None = None, most_waiting: int = 256) -> None:
        self._name = name
        self._size = threads
        self._per_share_group = per_share_group or threads
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[_Task]] = {}  # in the order of their turns; none is empty
        self._running: Counter[str] = Counter()
        self._threads: list[FairThread] = []
        self._closed = False

    async def run(self, share_group: str, work: Callable[[Check], T]) -> T:
        """The result of `work`, which is given a check. Cancelling leaves it: it ends at its next check.

        Raises:
            RateLimitedError: too much of the share group's work waits.
            UnavailableError: the threads were closed.
        """
        task = _Task(work, asyncio.get_running_loop().create_future(), contextvars.copy_context())
        self._add(share_group, task)
        try:
            found: T = await task.future
            return found
        finally:
            self._leave(share_group, task)

    def close(self) -> None:
        """Take nothing more and leave what runs."""
        with self._changed:
            self._closed = True
            left = [task for queue in self._waiting.values() for task in queue]
            self._waiting.clear()
            self._changed.notify_all()
        for task in left:
            _settle(task.future, None, _closed())

    def _add(self, share_group: str, task: _Task) -> None:
        with self._changed:
            if self._closed:
                raise _closed()
            queue = self._waiting.setdefault(share_group, deque())
            if len(queue) >= self._most_waiting:
                raise RateLimitedError("Too many of your requests are waiting; retry in a moment.", code="queue_full")
            queue.append(task)
            while len(self._threads) < self._size:
                thread = FairThread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _leave(self, share_group: str, task: _Task) -> None:
        task.abandoned = True
        with self._changed:
            queue = self._waiting.get(share_group)
            if queue is not None and task in queue:
                queue.remove(task)
                if not queue:
                    del self._waiting[share_group]

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            share_group, task = taken
            result, error = None, None
            try:
                result = task.context.run(task.work, task.check)
            except BaseException as raised:  # noqa: BLE001  # handed to whoever waits, whatever it is
                error = raised
            with self._changed:
                self._running[share_group] -= 1
                if not self._running[share_group]:
                    del self._running[share_group]  # a tenant may never come back
                self._changed.notify_all()
            with suppress(RuntimeError):  # the loop was closed, and with it all who waited
                task.future.get_loop().call_soon_threadsafe(_settle, task.future, result, error)

    def _take(self) -> tuple[str, _Task] | None:
        """The next task, waiting for one; None at the end."""
        with self._changed:
            while not self._closed:
                for share_group, queue in self._waiting.items():
                    if self._running[share_group] < self._per_share_group:
                        task = queue.popleft()
                        del self._waiting[share_group]
                        if queue:
                            self._waiting[share_group] = queue  # behind the others
                        self._running[share_group] += 1
                        return share_group, task
                self._changed.wait()
            return None


def leave_threads() -> None:
    """End the process if one of these threads is busy: the interpreter cannot end beside it, and nobody waits."""
    for thread in threading.enumerate():
        if isinstance(thread, FairThread):
            thread.join(_PARTING_SECONDS)  # an idle one is on its way out
            if thread.is_alive():
                logging.shutdown()
                sys.stdout.flush()
                os._exit(0)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return  # it was cancelled
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _closed() -> UnavailableError:
    return UnavailableError("The server is shutting down; send the request again.", code="shutting_down")
