"""What a sequence says after a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenora.engine.messages import FinishReason, SequenceFailed, SequenceOutput
from tenora.engine.model_runner import Result
from tenora.engine.sequence import SequenceState
from tenora.model.out_of_memory import is_out_of_memory

Item = SequenceOutput | SequenceFailed


def failed(request_id: str, code: str, message: str) -> SequenceFailed:
    """The end of a sequence by an error."""
    return SequenceFailed(request_id=request_id, code=code, message=message)


def step_failure(error: Exception) -> tuple[str, str]:
    """Code and message for the sequences of a step that raised."""
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out_of_memory", "The engine ran out of memory in this step; retry, or use smaller batches."
    return "engine_error", f"The engine failed in this step ({type(error).__name__}); retry."


def is_final(item: Item) -> bool:
    """Whether nothing follows this output."""
    return isinstance(item, SequenceFailed) or item.finish_reason is not None


def advance(sequence: SequenceState, result: Result, max_model_len: int) -> Item:
    """Append the sampled token unless it is a stop token, and say what is new and whether that was all.

    Args:
        sequence: its end was computed in this step; changed in place.
        result: what the step gave it.
        max_model_len: tokens that a sequence may have, prompt and virtual ones included.
    """
    if (failure := _not_finite(sequence, result)) is not None:
        return failure
    if result.pooled is not None:
        return _pooled(sequence, result.pooled)
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id = None
    if result.token is None:
        finish_reason = "length"  # max_tokens is 0: only the prompt was to be scored
    elif result.token in sequence.stop_ids:
        finish_reason, stop_token_id = "stop", result.token
    else:
        token_ids = [result.token]
        sequence.token_ids.append(result.token)
        if sequence.num_output >= sequence.sampling.max_tokens or sequence.length >= max_model_len:
            finish_reason = "length"
    first, sequence.reported = not sequence.reported, True
    logprobs = None
    if sequence.sampling.logprobs is not None:
        logprobs = [result.logprob] if token_ids and result.logprob is not None else []
    return SequenceOutput(
        request_id=sequence.id,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=sequence.prompt_logprobs if first else None,
        cached_tokens=(sequence.cached_tokens or 0) if first else 0,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        queue_seconds=sequence.queue_seconds if first else None,
    )


def _pooled(sequence: SequenceState, answer: Tensor) -> Item:
    sequence.reported = True
    if answer.numel() == 0:
        return failed(sequence.id, "invalid_request", "The adapter has no such head.")
    if not answer.isfinite().all():
        if not sequence.digest:
            return failed(sequence.id, "engine_error", "The model gave hidden states that are not finite.")
        message = "The adapter's weights overflow: with them no finite state or score comes out. Train it again."
        return failed(sequence.id, "adapter_overflow", message)
    return SequenceOutput(
        request_id=sequence.id,
        token_ids=[],
        cached_tokens=sequence.cached_tokens or 0,
        finish_reason="stop",
        queue_seconds=sequence.queue_seconds,
        pooled=answer.numpy().tobytes(),
    )


def _not_finite(sequence: SequenceState, result: Result) -> SequenceFailed | None:
    """The failure of a sequence whose scores are not numbers. With the same adapter or request it comes again."""
    scored = sequence.prompt_logprobs if sequence.digest and not sequence.reported else None
    if (result.token is None or result.token >= 0) and not any(e and math.isnan(e.logprob) for e in scored or ()):
        return None
    if sequence.digest:
        message = "The adapter's weights overflow: with them the model gives no token a finite score. Train it again."
        return failed(sequence.id, "adapter_overflow", message)
    if not sequence.plain:
        message = "The sampling parameters leave no token with a finite score; choose values of ordinary size."
        return failed(sequence.id, "invalid_request", message)
    return failed(sequence.id, "engine_error", "The model gave no finite score for any token.")
