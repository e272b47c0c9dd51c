"""What chat and text completions make of the control plane's deltas: order, usage, timings, log-probabilities."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tenora.aclosing import aclosing
from tenora.api.schemas.sampling import GenerationBody, PromptLogprob, PromptLogprobs, PromptTokensDetails, Usage
from tenora.control.adapters.records import Target
from tenora.control.inference.inference import Inference
from tenora.control.inference.records import Delta, GenerationRequest, LogprobEntry
from tenora.engine.messages import FinishReason, SamplingParams
from tenora.errors import UnavailableError
from tenora.telemetry.metrics import RequestTimer

T = TypeVar("T")
BUFFERED = 64  # deltas between the generations of one request and its reader


@dataclass(slots=True)
class Tally:
    """Counts the tokens of a request, whose choices come from one prompt or from several."""

    latest: dict[tuple[int, int], Delta] = field(default_factory=dict)  # by prompt and choice
    reasons: list[str] = field(default_factory=list)

    def add(self, source: int, delta: Delta) -> None:
        """Count a delta of the prompt number `source`."""
        self.latest[source, delta.index] = delta
        if delta.finish_reason is not None:
            self.reasons.append(delta.finish_reason)

    def usage(self, *, scored_only: bool = False) -> Usage:
        """What was used so far; with `scored_only` no generated token counts."""
        prompts: dict[int, tuple[int, int]] = {}  # tokens, and those of them that were cached
        for (source, _), delta in self.latest.items():
            cached = max(delta.cached_tokens, prompts.get(source, (0, 0))[1])
            prompts[source] = delta.prompt_tokens, cached
        prompt = sum(tokens for tokens, _ in prompts.values())
        completion = 0 if scored_only else sum(delta.completion_tokens for delta in self.latest.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached for _, cached in prompts.values())),
        )


def generation_request(
    inference: Inference, body: GenerationBody, target: Target, prompt: Sequence[int], sampling: SamplingParams
) -> GenerationRequest:
    """The generation of one tokenized prompt, as `body` wants it.

    Raises:
        InvalidRequestError: a token id in `body` is not in the vocabulary.
    """
    inference.prompts.check_ids(body.logit_bias or (), "logit_bias")
    inference.prompts.check_ids(body.stop_token_ids or (), "stop_token_ids")
    return GenerationRequest(
        target=target,
        prompt_token_ids=prompt,
        sampling=sampling,
        n=body.choices,
        stop=body.stop or (),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens is not False,
        priority=body.priority or 0,
        at_once=bool(body.stream),
    )


async def generate(
    inference: Inference, requests: Sequence[GenerationRequest], tally: Tally, timer: RequestTimer
) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of all `requests` as they come, each with its request's index; counted and timed.

    Closing the generator aborts everything that still runs.
    """
    try:
        async with aclosing(merged([inference.generate(request) for request in requests])) as deltas:
            async for source, delta in deltas:
                timer.token(delta.queue_seconds)
                tally.add(source, delta)
                yield source, delta
    except (GeneratorExit, asyncio.CancelledError):
        missing = sum(request.n for request in requests) - len(tally.reasons)
        tally.reasons += ["abort"] * missing
        _finish(timer, tally)
        raise
    _finish(timer, tally)


def _finish(timer: RequestTimer, tally: Tally) -> None:
    usage = tally.usage()
    timer.finish(usage.prompt_tokens, usage.completion_tokens, tally.reasons)


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


async def collect(deltas: AsyncIterator[tuple[int, Delta]], tally: Tally, expected: int) -> Collected:
    """Read all deltas of a request of `expected` choices.

    Raises:
        UnavailableError: if a choice did not come to its end.
    """
    texts: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    collected = Collected({}, {})
    async with aclosing(deltas) as items:
        async for source, delta in items:
            key = (source, delta.index)
            choice = collected.choices.setdefault(key, Choice())
            texts[key].append(delta.text)
            choice.logprobs.extend(delta.logprobs or ())
            if delta.prompt_logprobs is not None:
                collected.prompt_logprobs[source] = delta.prompt_logprobs
            if delta.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
    if len(tally.reasons) != expected:
        raise UnavailableError("The engine stopped before the answer was complete. Repeat the request.")
    for key, parts in texts.items():
        collected.choices[key].text = "".join(parts)
    return collected


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """The items of all streams as they come, each with its stream's index. The first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue(BUFFERED)

    async def forward(index: int, stream: AsyncIterator[T]) -> None:
        async with aclosing(stream) as items:
            async for item in items:
                await queue.put((index, item))

    async def forward_all() -> None:
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for index, stream in enumerate(streams):
                    group.create_task(forward(index, stream))
        except ExceptionGroup as errors:
            failure = errors.exceptions[0]  # the others are only cancelled because of it
        await queue.put(None)
        if failure is not None:
            raise failure

    worker = asyncio.create_task(forward_all())
    try:
        while (pair := await queue.get()) is not None:
            yield pair
        await worker
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)


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
