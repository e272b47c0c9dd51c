"""What an engine says while it loads. Steps that follow closely on one another are told as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tenora.engine.messages import Loading, LoadingPhase
from tenora_kernels.cpu.runtime.watch import watching

PERIOD_SECONDS = 0.1


class LoadingProgress:
    """Makes `Loading` events of what is done, ten a second at most; a phase's first and last are always told."""

    def __init__(self, report: Callable[[Loading], None]) -> None:
        self._report = report
        self._phase = ""
        self._told = 0.0

    def weights(self, done: int, total: int) -> None:
        """So many of the weights' numbers are in their places."""
        self._tell("weights", done, total, 0)

    def kernels(self, done: int, total: int, found: int = 0) -> None:
        """So many kernels are compiled or, `found` of them, were read from the cache."""
        self._tell("kernels", done, total, found)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Tell what is compiled in this process in the block; how much that will be is not known."""
        done: set[Any] = set()

        def tell(kernel: Any) -> None:
            done.add(kernel)
            self.kernels(len(done), 0)

        with watching(tell):
            yield

    def _tell(self, phase: LoadingPhase, done: int, total: int, found: int) -> None:
        now = time.monotonic()
        if phase == self._phase and done != total and now - self._told < PERIOD_SECONDS:
            return
        self._phase, self._told = phase, now
        self._report(Loading(phase=phase, done=done, total=total, found=found))
