"""What chat and text completions share: how a body becomes a request, and what is made of the deltas that come back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tenora.aclosing import aclosing
from tenora.api.schemas.sampling import (
    GenerationBody,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    Usage,
    UsedAdapter,
)
from tenora.control.inference.inference import Submission
from tenora.control.inference.metering import Meter
from tenora.control.inference.records import InferenceRequest, LogprobEntry, Prompt
from tenora.engine.messages import FinishReason
from tenora.errors import UnavailableError


def inference_request(
    body: GenerationBody,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    echo: bool = False,
) -> InferenceRequest:
    """What `body` asks for."""
    return InferenceRequest(
        model=body.model,
        adapter_id=body.adapter_id,
        composition=body.composition,
        prompts=prompts,
        max_tokens=max_tokens,
        sampling=partial(body.sampling_params, logprobs=logprobs, prompt_logprobs=prompt_logprobs),
        n=body.choices,
        echo=echo,
        echo_offsets=logprobs is not None,
        stop=body.stop or (),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens is not False,
        priority=body.priority or 0,
        at_once=bool(body.stream),
    )


def usage(meter: Meter, *, scored_only: bool = False) -> Usage:
    """What was used so far; with `scored_only` no generated token counts."""
    used = meter.used()
    completion = 0 if scored_only else used.completion
    return Usage(
        prompt_tokens=used.prompt,
        completion_tokens=completion,
        total_tokens=used.prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=used.cached),
        adapters=[UsedAdapter.of(version) for version in meter.composed] or None,
    )


@dataclass(slots=True)
class Choice:
    """One answer, collected."""

    text: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Collected:
    """All answers of a request: choices by prompt and index, and what was said of each prompt."""

    choices: dict[tuple[int, int], Choice]
    prompt_logprobs: dict[int, Sequence[LogprobEntry | None]]


async def collect(submission: Submission) -> Collected:
    """Read all deltas of a request.

    Raises:
        UnavailableError: if a choice did not come to its end.
    """
    texts: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    collected = Collected({}, {})
    async with aclosing(submission.deltas) as items:
        async for source, delta in items:
            key = (source, delta.index)
            choice = collected.choices.setdefault(key, Choice())
            texts[key].append(delta.text)
            choice.logprobs.extend(delta.logprobs or ())
            if delta.prompt_logprobs is not None:
                collected.prompt_logprobs[source] = delta.prompt_logprobs
            if delta.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
    if not submission.meter.complete:
        raise UnavailableError("The engine stopped before the answer was complete. Repeat the request.")
    for key, parts in texts.items():
        collected.choices[key].text = "".join(parts)
    return collected


def prompt_logprobs(entries: Sequence[LogprobEntry | None] | None, count: int | None) -> PromptLogprobs | None:
    """Log-probabilities of a prompt in vLLM's shape, `count` alternatives at each place; None if not wanted."""
    if entries is None or count is None:
        return None
    return [None if entry is None else _place(entry, count) for entry in entries]


def _place(entry: LogprobEntry, count: int) -> dict[str, PromptLogprob]:
    ranks = {token_id: rank for rank, (token_id, *_) in enumerate(entry.top, start=1)}
    place = {
        str(entry.token_id): PromptLogprob(
            logprob=entry.logprob, rank=ranks.get(entry.token_id), decoded_token=entry.token
        )
    }
    for rank, (token_id, token, _, logprob) in enumerate(entry.top[:count], start=1):
        place.setdefault(str(token_id), PromptLogprob(logprob=logprob, rank=rank, decoded_token=token))
    return place
