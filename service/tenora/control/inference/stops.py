"""What ends a generation: end tokens, stop tokens, and stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenora.control.inference.records import GenerationRequest
    from tenora.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends the text of a request.

    Attributes:
        tokens: by id, the stop token or string that the answer names as its reason; None for the model's own ends.
        strings: those to look for in the text.
    """

    tokens: Mapping[int, int | str | None]
    strings: Sequence[str]

    @classmethod
    def of(cls, request: GenerationRequest, tokenizer: Tokenizer) -> Stops:
        """All that the request asks for, and the model's own ends unless it ignores them.

        A stop string that is exactly a special token never shows in the text: it is that token.
        """
        tokens: dict[int, int | str | None] = {}
        if not request.ignore_eos:
            tokens.update(dict.fromkeys(tokenizer.eos_token_ids))
        strings = []
        for stop in request.stop:
            token_id = tokenizer.special_token_id(stop)
            if token_id is None:
                strings.append(stop)
            else:
                tokens[token_id] = stop
        tokens.update({token_id: token_id for token_id in request.sampling.stop_token_ids})
        return cls(tokens, strings)


class StopScanner:
    """Passes text on up to the first stop string; what may be the beginning of one is held back.

    The result does not depend on how the text is cut into pieces: the match that is complete first counts, and of those
    complete at the same character the longest.

    Attributes:
        matched: the stop string that was found, or None. Nothing may be fed after that.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self.matched: str | None = None
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more text; return what can be shown now."""
        if not self._stops:
            return text
        buffer = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := buffer.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return buffer[: end if self._include else start]
        cut = len(buffer) - self._begun(buffer)
        self._held = buffer[cut:]
        return buffer[:cut]

    def skip(self, text: str) -> str:
        """Take text in which no stop string counts; return it with all that was held back."""
        held, self._held = self._held, ""
        return held + text

    def flush(self) -> str:
        """The text is over: return what was held back, which begins a stop string but does not end it."""
        return self.skip("")

    def _begun(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        for length in range(min(len(buffer), max(map(len, self._stops)) - 1), 0, -1):
            tail = buffer[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
