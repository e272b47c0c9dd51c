"""What the engine refuses: a request that would break a step would take its whole batch with it."""

from __future__ import annotations

import math

from tenora.engine.messages import Generate, Pool, SamplingParams
from tenora.errors import ContextLengthError, InvalidRequestError

MAX_LOGPROBS = 1024
DEEPEST_LAYER = -4
"""Of a `Pool`."""


def check_request(request: Generate | Pool, *, vocab_size: int, max_model_len: int) -> None:
    """Raise unless the sequence can run on a base of at least -DEEPEST_LAYER - 1 layers.

    Raises:
        ContextLengthError: the prompt leaves no room for a token.
        InvalidRequestError: no prompt, a token outside of the vocabulary, or a parameter out of range.
    """
    tokens, sampling = request.token_ids, request.sampling if isinstance(request, Generate) else None
    if not tokens:
        raise InvalidRequestError("The prompt is empty; send at least one token.", param="prompt")
    if len(tokens) + (0 if sampling is None else min(sampling.max_tokens, 1)) > max_model_len:
        raise ContextLengthError(
            f"The prompt has {len(tokens)} tokens and the model's context is {max_model_len}; shorten the prompt."
        )
    mentioned = tokens if sampling is None else (*tokens, *sampling.logit_bias, *sampling.stop_token_ids)
    if min(mentioned) < 0 or max(mentioned) >= vocab_size:
        raise InvalidRequestError(f"A token id is not one of the model's {vocab_size}; use ids from 0 on.")
    if isinstance(request, Pool):
        _check_pool(request)
    else:
        _check_sampling(request.sampling)


def _check_pool(request: Pool) -> None:
    if not DEEPEST_LAYER <= request.layer <= -1:
        raise InvalidRequestError(f"layer is {request.layer}; it must be {DEEPEST_LAYER} to -1.", param="layer")
    if request.head is not None and not 0 <= request.head[0] < request.head[1]:
        raise InvalidRequestError("The head has no rows.", param="head")


def _check_sampling(sampling: SamplingParams) -> None:
    numbers = {
        "temperature": (sampling.temperature, sampling.temperature >= 0),
        "top_p": (sampling.top_p, 0 < sampling.top_p <= 1),
        "min_p": (sampling.min_p, 0 <= sampling.min_p <= 1),
        "repetition_penalty": (sampling.repetition_penalty, 0.001 <= sampling.repetition_penalty <= 1000),
        "frequency_penalty": (sampling.frequency_penalty, True),
        "presence_penalty": (sampling.presence_penalty, True),
        "logit_bias": (sum(sampling.logit_bias.values()), True),
        "max_tokens": (sampling.max_tokens, sampling.max_tokens >= 0),
        "min_tokens": (sampling.min_tokens, sampling.min_tokens >= 0),
        "logprobs": (sampling.logprobs or 0, 0 <= (sampling.logprobs or 0) <= MAX_LOGPROBS),
        "prompt_logprobs": (sampling.prompt_logprobs or 0, 0 <= (sampling.prompt_logprobs or 0) <= MAX_LOGPROBS),
        "prompt_logprobs_from": (sampling.prompt_logprobs_from, sampling.prompt_logprobs_from >= 1),
    }
    for name, (value, in_range) in numbers.items():
        if not (math.isfinite(value) and in_range):
            raise InvalidRequestError(f"{name} is {value}, which is out of range; see the API reference.", param=name)
