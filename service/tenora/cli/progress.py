"""Progress of fetching a model and of a server's start, on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from tenora.api.start_state import StartState
from tenora_client import Bar

PERIOD_SECONDS = 2.0
"""Between two lines of a log: long enough not to fill it, short enough not to look dead."""

log = logging.getLogger(__name__)


class StartProgress:
    """Shows a `StartState`: a bar for each phase on a terminal, elsewhere a line of the log now and then.

    Usable as the `progress` of `tenora.model.catalog`.

    Attributes:
        state: as it is now.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, phase: str = "engine"
    ) -> None:
        self.state = StartState(phase)
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = self._told = clock()
        self._shown = ""
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, phase: str, done: int, total: int, found: int = 0) -> None:
        """So much of a phase is done."""
        state = self.state
        if phase != state.phase and state.done < state.total:
            state.done = state.total  # what another phase follows has ended, though its last step was not told
            self.show()
        state.phase, state.done, state.total, state.found = phase, done, total, found
        self.show()

    def show(self) -> None:
        """Draw the state as it is now, or log it if the last line is old or of another phase."""
        if self._stream.isatty():
            self._draw()
        elif self.state.phase != self._shown or self._clock() - self._told >= PERIOD_SECONDS:
            self._shown, self._told = self.state.phase, self._clock()
            log.info("%s", self.state.text, extra={"seconds": round(self._told - self._began, 1)})

    def _draw(self) -> None:
        if self.state.phase != self._shown:
            if self._bar is not None:
                self._bar.close()
            self._shown, self._bar = self.state.phase, Bar(self.state.words, self._stream)
        if self._bar is not None:
            rest = self.state.text.removeprefix(self.state.words).strip()
            seconds = f"{self._clock() - self._began:.0f} s"
            self._bar.draw(self.state.done, self.state.total, f"{rest}  {seconds}".strip())
