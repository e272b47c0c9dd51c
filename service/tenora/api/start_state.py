"""How far the start of the service is, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WORDS = {
    "download": "downloading the base",
    "verify": "verifying the base",
    "extract": "extracting the base",
    "convert": "converting the base",
    "engine": "starting the engine",
    "weights": "loading weights",
    "kernels": "compiling kernels",
}


@dataclass(slots=True)
class StartState:
    """How far the start is.

    Attributes:
        phase: what is done now, a key of the words above.
        done, total: of it; a total of 0 is not known.
        found: how many of the done kernels an earlier start had left in the cache.
    """

    phase: str = "engine"
    done: int = 0
    total: int = 0
    found: int = 0

    @property
    def words(self) -> str:
        """What is done now, without how far."""
        return _WORDS.get(self.phase, self.phase)

    @property
    def text(self) -> str:
        """A line for people: `compiling kernels 42 of 140, 38 of them found in the cache`, `loading weights 60 %`."""
        if self.phase == "kernels":
            count = f"{self.words} {self.done} of {self.total}" if self.total else f"{self.words}, {self.done} so far"
            return f"{count}, {self.found} of them found in the cache" if self.found else count
        return f"{self.words} {100 * self.done // self.total} %" if self.total else self.words

    def body(self) -> dict[str, Any]:
        """What a probe answers."""
        numbers = {"phase": self.phase, "done": self.done, "total": self.total, "found": self.found}
        return {"status": "starting", **numbers, "message": self.text}
