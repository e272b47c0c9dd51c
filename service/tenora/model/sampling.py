"""How tokens are chosen, and what is told of them. Free of torch."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. The defaults are greedy-free plain sampling, as OpenAI's.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        logprobs: None is off; k >= 0 gives the chosen token's and the k most likely ones'.
        prompt_logprobs: the same for the prompt's tokens.
        prompt_logprobs_from: index of the first prompt token that gets them, at least 1; what lies before may come from
            the prefix cache.
        seed: with a seed, equal requests give equal tokens whatever else is in the batch.
        stop_token_ids: all the tokens that end the sequence: the engine knows none of its own.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token with its log-probability (natural log) and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
