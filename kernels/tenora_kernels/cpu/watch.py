"""How far compilation is: a report for each function that was compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

__all__ = ["watching"]


@contextmanager
def watching(report: Callable[[int, int], None]) -> Iterator[None]:
    """Report, on the thread that compiles, how many functions were compiled; how many there are is not known: 0."""
    listener = _Listener(report)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)


class _Listener(event.Listener):  # type: ignore[misc]  # numba has no types
    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self._done = 0

    def on_start(self, event: Any) -> None:  # numba's signature
        """Nothing is done yet."""

    def on_end(self, event: Any) -> None:  # noqa: ARG002  # numba's signature
        """A function was compiled for one kind of arguments."""
        self._done += 1
        self._report(self._done, 0)
