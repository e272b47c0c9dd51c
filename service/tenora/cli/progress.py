"""Progress of fetching a model, on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self, TextIO

from tenora_client import Bar

_WORDS = {"download": "downloading", "verify": "verifying", "extract": "extracting", "convert": "converting"}


class PullProgress:
    """A bar for each stage, usable as the `progress` of `tenora.model.catalog`; silent if nothing is to be done."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name
        self._stream = stream or sys.stderr
        self._stage = ""
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Draw `done` of `total` of a stage."""
        if stage != self._stage:
            if self._bar is not None:
                self._bar.close()
            self._stage = stage
            self._bar = Bar(f"{_WORDS.get(stage, stage)} {self._name}", self._stream)
        if self._bar is not None:
            self._bar.draw(done, total, "")
