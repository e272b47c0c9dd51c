"""Answers to give the scripted engine."""

from __future__ import annotations

from collections.abc import Sequence

from tenora.engine.messages import Generate, SequenceFailed, SequenceOutput, TokenLogprob


def scores(request: Generate, logprob: float | None = None) -> list[SequenceOutput]:
    """Every token of the prompt at `logprob`, by default -2 under the base and -1 under any adapter."""
    value = logprob if logprob is not None else -2.0 if request.adapter is None else -1.0
    first = request.sampling.prompt_logprobs_from
    found = [None if place < first else TokenLogprob(token, value) for place, token in enumerate(request.token_ids)]
    return [SequenceOutput(request_id=request.request_id, token_ids=[], prompt_logprobs=found, finish_reason="length")]


def outputs(
    request: Generate, ids: Sequence[int], *, chunk: int = 1, finish: str = "length", stop_token: int | None = None
) -> list[SequenceOutput]:
    """The engine's outputs for these tokens, `chunk` at a time, the last with a finish_reason."""
    pieces = [list(ids[start : start + chunk]) for start in range(0, len(ids), chunk)] or [[]]
    wanted = request.sampling.logprobs is not None
    return [
        SequenceOutput(
            request_id=request.request_id,
            token_ids=piece,
            logprobs=[TokenLogprob(token, -0.5, ((token, -0.5), (5, -2.0))) for token in piece] if wanted else None,
            cached_tokens=16 if index == 0 else 0,
            finish_reason=finish if index == len(pieces) - 1 else None,  # type: ignore[arg-type]  # a literal here
            stop_token_id=stop_token if index == len(pieces) - 1 else None,
        )
        for index, piece in enumerate(pieces)
    ]


def refusal(request: Generate, code: str, message: str) -> list[SequenceFailed]:
    """The engine cannot do it; codes as of `SequenceFailed`."""
    return [SequenceFailed(request_id=request.request_id, code=code, message=message)]
