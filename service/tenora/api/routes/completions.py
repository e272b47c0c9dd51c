"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request

from tenora.api.attendance import EventStream, attended
from tenora.api.dependencies import ControlDep, Infer, JsonRoute, LifecycleDep, MetricsDep
from tenora.api.generation import (
    Choice,
    Collected,
    Tally,
    check_token_ids,
    collect,
    generate,
    generation_request,
    prompt_logprobs,
)
from tenora.api.schemas import completions as schema
from tenora.control.closing import closing
from tenora.control.inference import Inference
from tenora.control.records import Delta, GenerationRequest, LogprobEntry, Target
from tenora.errors import ContextLengthError, InvalidRequestError

router = APIRouter(tags=["inference"], route_class=JsonRoute)


@router.post("/v1/completions", response_model=schema.Completion)
async def create_completion(
    body: schema.CompletionRequest,
    request: Request,
    caller: Infer,
    control: ControlDep,
    metrics: MetricsDep,
    lifecycle: LifecycleDep,
) -> schema.Completion | EventStream:
    """Continue one or several prompts, each `n` times. Choice `i` belongs to prompt `i // n`."""
    timer = metrics.timer()
    inference = control.inference
    target = await inference.resolve(caller, body.model, body.adapter_id)
    prompts = await asyncio.to_thread(tokenize_all, inference, body.prompt)
    requests = [prepare(inference, body, target, ids) for ids in prompts]
    tally = Tally()
    deltas = generate(inference, requests, tally, timer)
    echo = (
        [echoed(inference, prompt, ids) for prompt, ids in zip(body.prompt, prompts, strict=True)]
        if body.echo
        else None
    )
    answer = CompletionAnswer(target.name, body, tally, echo)
    if body.stream:
        return EventStream(answer.chunks(deltas), lifecycle)
    return answer.complete(
        await attended(collect(deltas, tally, len(prompts) * body.choices), request.receive, lifecycle)
    )


def tokenize_all(inference: Inference, prompts: Sequence[schema.Prompt]) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        InvalidRequestError: if a prompt has no tokens, or an id is not in the vocabulary.
    """
    tokenized = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = inference.tokenize(prompt)
        else:
            check_token_ids(inference, prompt, "prompt")
            ids = prompt
        if not ids:
            raise InvalidRequestError("A prompt is empty. Send at least one character or token.", param="prompt")
        tokenized.append(ids)
    return tokenized


def prepare(inference: Inference, body: schema.CompletionRequest, target: Target, ids: list[int]) -> GenerationRequest:
    """The generation of one prompt, checked against the context."""
    # The engine generates at least one token; where none was asked for it is thrown away.
    try:
        max_tokens = inference.fit_max_tokens(len(ids), max(1, body.token_limit))
    except ContextLengthError as error:
        param = "prompt" if error.param == "messages" else error.param
        raise ContextLengthError(error.message, param=param) from error
    sampling = body.sampling_params(max_tokens, logprobs=body.logprobs, prompt_logprobs=body.prompt_alternatives)
    return generation_request(inference, body, target, ids, sampling)


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text, and the text of its first token, which has no log-probability."""

    text: str
    first_token: str


def echoed(inference: Inference, prompt: schema.Prompt, ids: Sequence[int]) -> Echo:
    """What `echo` repeats of a prompt."""
    text = prompt if isinstance(prompt, str) else inference.tokenizer.decode(ids, skip_special_tokens=False)
    return Echo(text, inference.tokenizer.decode(ids[:1], skip_special_tokens=False))


@dataclass(slots=True)
class CompletionAnswer:
    """Shapes deltas into the answer or its chunks, which share id, time and the model's name as it was asked for."""

    model: str
    body: schema.CompletionRequest
    tally: Tally
    echo: list[Echo] | None
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def scored_only(self) -> bool:
        """Nothing is generated; only the prompt is looked at."""
        return self.body.token_limit == 0

    def complete(self, collected: Collected) -> schema.Completion:
        """The whole answer."""
        choices = [
            self._choice(source, index, choice, collected)
            for (source, index), choice in sorted(collected.choices.items())
        ]
        return self._answer(choices, usage=True)

    def _choice(self, source: int, index: int, choice: Choice, collected: Collected) -> schema.CompletionChoice:
        echo = self.echo[source] if self.echo is not None else None
        prompt = collected.prompt_logprobs.get(source)
        entries: list[LogprobEntry | None] = [] if self.scored_only else [*choice.logprobs]
        if echo is not None and prompt is not None:
            entries = [*prompt, *entries]
        text = "" if self.scored_only else choice.text
        wanted = self.body.logprobs
        return schema.CompletionChoice(
            index=source * self.body.choices + index,
            text=f"{echo.text}{text}" if echo is not None else text,
            logprobs=None
            if wanted is None
            else legacy_logprobs(entries, wanted, first_token=echo.first_token if echo else ""),
            finish_reason="length" if self.scored_only else choice.finish_reason,
            stop_reason=None if self.scored_only else choice.stop_reason,
            prompt_logprobs=prompt_logprobs(prompt, self.body.prompt_logprobs),
        )

    async def chunks(self, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[str]:
        """The JSON of each event: the echo if wanted, the text as it comes, then the usage if it is wanted."""
        offsets: dict[int, int] = {}
        async with closing(deltas) as items:
            async for source, delta in items:
                index = source * self.body.choices + delta.index
                if index not in offsets and self.echo is not None:
                    yield self._chunk(index, self.echo[source].text)
                offset = offsets.setdefault(index, 0)
                logprobs = None
                if self.body.logprobs is not None and delta.logprobs:
                    logprobs = legacy_logprobs(delta.logprobs, self.body.logprobs, offset=offset)
                    offsets[index] += sum(len(entry.token) for entry in delta.logprobs)
                if self.scored_only:
                    if delta.finish_reason:
                        yield self._chunk(index, "", finish_reason="length")
                elif delta.text or logprobs or delta.finish_reason:
                    yield self._chunk(index, delta.text, logprobs, delta.finish_reason, delta.stop_reason)
        if self.body.include_usage:
            yield self._answer([], usage=True).model_dump_json()

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: schema.CompletionLogprobs | None = None,
        finish_reason: schema.FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> str:
        choice = schema.CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason, stop_reason=stop_reason
        )
        return self._answer([choice], usage=False).model_dump_json()

    def _answer(self, choices: list[schema.CompletionChoice], *, usage: bool) -> schema.Completion:
        used = self.tally.usage(scored_only=self.scored_only) if usage else None
        return schema.Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=used)


def legacy_logprobs(
    entries: Sequence[LogprobEntry | None], count: int, *, offset: int = 0, first_token: str = ""
) -> schema.CompletionLogprobs:
    """Log-probabilities in the older shape, `count` alternatives each; an entry of None is a prompt's first token."""
    shaped = schema.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for entry in entries:
        token = first_token if entry is None else entry.token
        shaped.tokens.append(token)
        shaped.text_offset.append(offset)
        offset += len(token)
        if entry is None:
            shaped.token_logprobs.append(None)
            shaped.top_logprobs.append(None)
            continue
        shaped.token_logprobs.append(entry.logprob)
        alternatives = {text: logprob for _, text, _, logprob in entry.top[:count]}
        shaped.top_logprobs.append({entry.token: entry.logprob} | alternatives)
    return shaped
