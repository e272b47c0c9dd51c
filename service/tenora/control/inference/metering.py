"""What a request used, counted while its answers come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tenora.aclosing import aclosing
from tenora.control.adapters.records import WeightedVersion
from tenora.control.inference.records import Delta


class Timer(Protocol):
    """What times a request; `tenora.telemetry.metrics.RequestTimer` is one."""

    def token(self, queue_seconds: float | None = None) -> None:
        """Output has come. `queue_seconds`: how long the engine had let the request wait."""
        ...

    def finish(self, prompt_tokens: int, generation_tokens: int, reasons: Iterable[str]) -> None:
        """The request has ended. `generation_tokens` counts all choices; `reasons` has one finish reason for each."""
        ...


@dataclass(frozen=True, slots=True)
class Used:
    """Tokens of a request; a prompt counts once, however many choices it has.

    Attributes:
        cached: tokens of the prompts that were found in the prefix cache.
        completion: generated tokens of all choices.
    """

    prompt: int
    cached: int
    completion: int


@dataclass(slots=True)
class Meter:
    """Counts the tokens of a request, whose choices come from one prompt or from several.

    Attributes:
        expected: choices.
        composed: the adapters that the request composes or scales.
        latest: the newest delta, by prompt and choice.
        reasons: why choices ended.
    """

    timer: Timer
    expected: int
    composed: Sequence[WeightedVersion] = ()
    latest: dict[tuple[int, int], Delta] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every choice came to its end."""
        return len(self.reasons) == self.expected

    def used(self) -> Used:
        """So far."""
        prompts: dict[int, tuple[int, int]] = {}  # tokens, and those of them that were cached
        for (source, _), delta in self.latest.items():
            cached = max(delta.cached_tokens, prompts.get(source, (0, 0))[1])
            prompts[source] = delta.prompt_tokens, cached
        return Used(
            prompt=sum(tokens for tokens, _ in prompts.values()),
            cached=sum(cached for _, cached in prompts.values()),
            completion=sum(delta.completion_tokens for delta in self.latest.values()),
        )

    async def counted(self, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncGenerator[tuple[int, Delta], None]:
        """The same deltas, counted and timed. One that is closed before its end counts its choices as aborted."""
        try:
            async with aclosing(deltas) as items:
                async for source, delta in items:
                    self.timer.token(delta.queue_seconds)
                    self.latest[source, delta.index] = delta
                    if delta.finish_reason is not None:
                        self.reasons.append(delta.finish_reason)
                    yield source, delta
        except (GeneratorExit, asyncio.CancelledError):
            self.reasons += ["abort"] * (self.expected - len(self.reasons))
            self._finish()
            raise
        self._finish()

    def _finish(self) -> None:
        used = self.used()
        self.timer.finish(used.prompt, used.completion, self.reasons)
