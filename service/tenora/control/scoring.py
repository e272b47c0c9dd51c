"""Log-probabilities of given tokens, from the very path that serves requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tenora.adapters.ref import AdapterRef
from tenora.control.closing import closing
from tenora.control.names import random_word
from tenora.engine.messages import Generate, SamplingParams
from tenora.errors import RateLimitedError, UnavailableError

if TYPE_CHECKING:
    from tenora.engine.client import AsyncEngine

_log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0  # of a busy engine: a full queue, no free slot, a step that ran out of memory
_GONE = frozenset({"engine_lost", "engine_shutdown", "draining"})


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores texts for one fairness group.

    Attributes:
        group, weight, priority: as of `Generate`; what texts begin with is cached for this group alone.
    """

    engine: AsyncEngine
    group: str
    weight: float = 1.0
    priority: int = 0

    async def score(
        self, tokens: Sequence[int], adapter: AdapterRef | None = None, *, first: int = 1
    ) -> npt.NDArray[np.float64]:
        """The log-probability of tokens `first`, `first` + 1, … given those before: [len(tokens) - first], natural log.

        A busy engine is asked again for a while.

        Args:
            tokens: more than `first`, at most the engine's `max_model_len`.
            adapter: None is the base.
            first: at least 1; texts that begin alike share what lies well before it.

        Raises:
            UnavailableError: the engine is gone (codes engine_lost, engine_shutdown, draining), or it could not do it
                for PATIENCE_SECONDS.
            RateLimitedError: the queue was full for as long.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await self._once(tokens, adapter, first)
            except (RateLimitedError, UnavailableError) as error:
                gone = error.code in _GONE or not self.engine.alive
                if gone or time.monotonic() + error.retry_after > deadline:
                    raise
                _log.info("scoring waits for the engine: %s", error.message)
                await asyncio.sleep(error.retry_after)

    async def _once(self, tokens: Sequence[int], adapter: AdapterRef | None, first: int) -> npt.NDArray[np.float64]:
        command = Generate(
            request_id=f"score-{random_word(16)}",
            token_ids=list(tokens),
            sampling=SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=first),
            adapter=adapter,
            group=self.group,
            weight=self.weight,
            priority=self.priority,
            cache_salt=self.group,
        )
        found: list[float] = []
        async with closing(self.engine.generate(command)) as outputs:
            async for output in outputs:
                found += [entry.logprob for entry in output.prompt_logprobs or () if entry is not None]
        if len(found) != len(tokens) - first:
            raise UnavailableError(
                f"The engine scored {len(found)} of {len(tokens) - first} tokens; try again.", code="engine_error"
            )
        return np.array(found, dtype=np.float64)
