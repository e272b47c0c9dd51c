"""Which kernels a job consists of, and when each of them was compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from numba.core import event
from numba.core.dispatcher import Dispatcher

__all__ = ["reachable", "watching"]


def reachable(kernels: Iterable[Any]) -> set[Any]:
    """Compiled functions among the globals that `kernels` name, those that these name, and so on, with themselves."""
    found: set[Any] = set()
    waiting = list(kernels)
    while waiting:
        kernel = waiting.pop()
        if kernel not in found:
            found.add(kernel)
            waiting += _named(kernel)
    return found


def _named(kernel: Any) -> list[Any]:
    function = kernel.py_func
    names = function.__code__.co_names
    values = [function.__globals__.get(name) for name in names]
    for module in [value for value in values if isinstance(value, ModuleType)]:
        values += [getattr(module, name, None) for name in names]
    return [value for value in values if isinstance(value, Dispatcher)]


@contextmanager
def watching(tell: Callable[[Any], None]) -> Iterator[None]:
    """Call `tell` with each kernel that is compiled in this process, on the thread that does it."""
    listener = _Listener(tell)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)


class _Listener(event.Listener):  # type: ignore[misc]  # numba has no types
    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell

    def on_start(self, event: Any) -> None:  # numba's signature
        """Nothing is done yet."""

    def on_end(self, event: Any) -> None:
        """A function was compiled for one kind of arguments."""
        self._tell(event.data["dispatcher"])
