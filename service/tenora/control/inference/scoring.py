"""Log-probabilities of given tokens, from the very path that serves requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenora.aclosing import aclosing
from tenora.adapters.heads import Head
from tenora.adapters.ref import AdapterRef
from tenora.control.registry.ids import random_word
from tenora.engine.messages import Generate, Pool, SamplingParams
from tenora.errors import RateLimitedError, TenoraError, UnavailableError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine

_log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0  # of a busy engine: a full queue, no free slot, a step that ran out of memory
_BEHIND = 0.1  # weight beside the tenants' share groups
_GONE = frozenset({"engine_lost", "engine_shutdown", "draining"})


def is_gone(error: TenoraError, engine: AsyncEngine) -> bool:
    """Whether scoring failed with the engine, which a later one can do again."""
    return error.code in _GONE or not engine.alive


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores texts for one share group.

    Attributes:
        share_group, weight, priority: as of `Generate`; what texts begin with is cached for this share group alone.
    """

    engine: AsyncEngine
    share_group: str
    weight: float = 1.0
    priority: int = 0

    @classmethod
    def behind_requests(cls, engine: AsyncEngine, tenant_id: str) -> Scorer:
        """For the many rows of a comparison, in a share group beside the tenants' own: their requests come first."""
        return cls(engine, f"{tenant_id}/baselines", weight=_BEHIND)

    async def score(
        self, tokens: Sequence[int], places: Sequence[int], adapter: AdapterRef | None = None
    ) -> list[float]:
        """The log-probabilities (natural) of the tokens at `places`, each given all tokens before it.

        A busy engine is asked again for a while.

        Args:
            tokens: at most the engine's `max_model_len`.
            places: ascending, the first one above 0; texts that begin alike share what lies well before it.
            adapter: None is the base.

        Raises:
            UnavailableError: the engine is gone (codes engine_lost, engine_shutdown, draining), or it could not do it
                for PATIENCE_SECONDS.
            RateLimitedError: the queue was full for as long.
        """
        scores = await self._patiently(lambda: self._once(tokens, places[0], adapter))
        return [scores[place - places[0]] for place in places]

    async def head(self, tokens: Sequence[int], head: Head, adapter: AdapterRef) -> list[float]:
        """What a head of an adapter says of a text, as it is served, before its numbers are told in any unit.

        Raises:
            UnavailableError, RateLimitedError: as `score`.
        """
        return await self._patiently(lambda: self._head_once(tokens, head, adapter))

    async def _patiently(self, ask: Callable[[], Awaitable[list[float]]]) -> list[float]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await ask()
            except (RateLimitedError, UnavailableError) as error:
                if is_gone(error, self.engine) or time.monotonic() + error.retry_after > deadline:
                    raise
                _log.info("scoring waits for the engine: %s", error.message)
                await asyncio.sleep(error.retry_after)

    async def _head_once(self, tokens: Sequence[int], head: Head, adapter: AdapterRef) -> list[float]:
        found = await self.engine.pool(
            Pool(
                request_id=f"head-{random_word(16)}",
                token_ids=list(tokens),
                layer=head.layer,
                pooling=head.pooling,
                head=(head.start, head.stop) if head.size else None,
                adapter=adapter,
                share_group=self.share_group,
                weight=self.weight,
                priority=self.priority,
                cache_salt=self.share_group,
            )
        )
        return [float(value) for value in memoryview(found.pooled or b"").cast("f")]

    async def _once(self, tokens: Sequence[int], first: int, adapter: AdapterRef | None) -> list[float]:
        """Of the tokens from `first` on."""
        command = Generate(
            request_id=f"score-{random_word(16)}",
            token_ids=list(tokens),
            sampling=SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=first),
            adapter=adapter,
            share_group=self.share_group,
            weight=self.weight,
            priority=self.priority,
            cache_salt=self.share_group,
        )
        found: list[float] = []
        async with aclosing(self.engine.generate(command)) as outputs:
            async for output in outputs:
                found += [entry.logprob for entry in output.prompt_logprobs or () if entry is not None]
        if len(found) != len(tokens) - first:
            raise UnavailableError(
                f"The engine scored {len(found)} of {len(tokens) - first} tokens; try again.", code="engine_error"
            )
        return found
