"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Request

from tenora.aclosing import aclosing
from tenora.api.chunks import TextEvents
from tenora.api.dependencies import ControlDep, JsonRoute, LifecycleDep, MetricsDep, may
from tenora.api.generation import (
    Choice,
    Collected,
    Tally,
    collect,
    generate,
    generation_request,
    prompt_logprobs,
)
from tenora.api.schemas import completions as schema
from tenora.api.sse import EventStream, attended
from tenora.control.adapters.records import Target
from tenora.control.inference.inference import Inference
from tenora.control.inference.prompts import Prompts
from tenora.control.inference.records import Delta, GenerationRequest, LogprobEntry
from tenora.control.tenancy.records import Principal
from tenora.errors import ContextLengthError
from tenora.model.tokenizer import Tokenizer

router = APIRouter(tags=["inference"], route_class=JsonRoute)


@router.post("/v1/completions", response_model=schema.Completion)
async def create_completion(
    body: schema.CompletionRequest,
    request: Request,
    caller: Annotated[Principal, may("completions.create")],
    control: ControlDep,
    metrics: MetricsDep,
    lifecycle: LifecycleDep,
) -> schema.Completion | EventStream:
    """Continue one or several prompts, each `n` times. Choice `i` belongs to prompt `i // n`."""
    timer = metrics.timer()
    inference = control.inference
    target = await inference.resolve(caller, body.model, body.adapter_id)
    prepared = await attended(prepare(inference, body, target), request.receive, lifecycle)
    tally = Tally()
    deltas = generate(inference, [one.generation for one in prepared], tally, timer)
    echo = [one.echo for one in prepared if one.echo is not None]
    answer = CompletionAnswer(target.name, body, tally, echo or None)
    if body.stream:
        return EventStream(answer.chunks(deltas), lifecycle)
    return answer.complete(
        await attended(collect(deltas, tally, len(prepared) * body.choices), request.receive, lifecycle)
    )


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text.

    Attributes:
        first: its first token, which has no log-probability: id, text and bytes.
        offsets: the character at which each token begins, where log-probabilities are wanted.
    """

    text: str
    first: tuple[int, str, Sequence[int]]
    offsets: Sequence[int]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that fits: its generation, and what is repeated of it."""

    generation: GenerationRequest
    echo: Echo | None


async def prepare(inference: Inference, body: schema.CompletionRequest, target: Target) -> list[Prepared]:
    """Tokenize every prompt and check that it fits the context; the first that does not ends it.

    Raises:
        InvalidRequestError: if a prompt has no tokens, or an id is not in the vocabulary.
        ContextLengthError: if a prompt does not fit.
    """

    def each(prompts: Prompts) -> list[Prepared]:
        return [_prepared(inference, body, target, prompt, prompts) for prompt in body.prompt]

    characters = sum(len(prompt) for prompt in body.prompt)
    return await inference.prepare(target, characters, each)


def _prepared(
    inference: Inference, body: schema.CompletionRequest, target: Target, prompt: schema.Prompt, prompts: Prompts
) -> Prepared:
    ids = prompts.text(prompt) if isinstance(prompt, str) else prompts.ids(prompt)
    try:
        max_tokens = inference.fit_max_tokens(len(ids), body.token_limit)
    except ContextLengthError as error:
        param = "prompt" if error.param == "messages" else error.param
        raise ContextLengthError(error.message, param=param) from error
    sampling = body.sampling_params(max_tokens, logprobs=body.logprobs, prompt_logprobs=body.prompt_alternatives)
    generation = generation_request(inference, body, target, ids, sampling)
    return Prepared(generation, _echoed(prompts.tokenizer, prompt, ids, body) if body.echo else None)


def _echoed(tokenizer: Tokenizer, prompt: schema.Prompt, ids: Sequence[int], body: schema.CompletionRequest) -> Echo:
    first = (ids[0], tokenizer.token_text(ids[0]), tokenizer.token_bytes(ids[0]))
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special_tokens=False)
    if body.logprobs is None:
        return Echo(text, first, ())
    if not isinstance(prompt, str):
        return Echo(text, first, tokenizer.offsets(ids))
    # What the tokenizer puts before a text (a bos) is not of the text.
    put = tokenizer.encode("", add_special_tokens=True)
    before = next((place for place, pair in enumerate(zip(ids, put, strict=False)) if pair[0] != pair[1]), len(put))
    return Echo(text, first, [0] * before + tokenizer.offsets(ids[before:]))


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
        shape = self._logprobs()
        if shape is not None:
            if echo is not None and prompt is not None:
                shape.add_prompt(echo, prompt)
            if not self.scored_only:
                shape.add(choice.logprobs, after=len(echo.text) if echo is not None else 0)
        text = "" if self.scored_only else choice.text
        return schema.CompletionChoice(
            index=source * self.body.choices + index,
            text=f"{echo.text}{text}" if echo is not None else text,
            logprobs=None if shape is None else shape.shaped,
            finish_reason="length" if self.scored_only else choice.finish_reason,
            stop_reason=None if self.scored_only else choice.stop_reason,
            prompt_logprobs=prompt_logprobs(prompt, self.body.prompt_logprobs),
        )

    async def chunks(self, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[str]:
        """The JSON of each event: the echo if wanted, the text as it comes, then the usage if it is wanted."""
        begun: set[int] = set()
        texts = TextEvents(self._chunk)
        async with aclosing(deltas) as items:
            async for source, delta in items:
                index = source * self.body.choices + delta.index
                if self.echo is not None and index not in begun:
                    begun.add(index)
                    yield texts(index, self.echo[source].text)
                logprobs = None
                if delta.logprobs and (shape := self._logprobs()) is not None:
                    shape.add(delta.logprobs)
                    logprobs = shape.shaped
                if self.scored_only:
                    if delta.finish_reason:
                        yield self._chunk(index, "", finish_reason="length").model_dump_json()
                elif delta.text and logprobs is None and delta.finish_reason is None:
                    yield texts(index, delta.text)
                elif delta.text or logprobs or delta.finish_reason:
                    chunk = self._chunk(index, delta.text, logprobs, delta.finish_reason, delta.stop_reason)
                    yield chunk.model_dump_json()
        if self.body.include_usage:
            yield self._answer([], usage=True).model_dump_json()

    def _logprobs(self) -> LegacyLogprobs | None:
        if self.body.logprobs is None:
            return None
        return LegacyLogprobs(self.body.logprobs, as_ids=bool(self.body.return_tokens_as_token_ids))

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: schema.CompletionLogprobs | None = None,
        finish_reason: schema.FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> schema.Completion:
        choice = schema.CompletionChoice(
            index=index, text=text, logprobs=logprobs, finish_reason=finish_reason, stop_reason=stop_reason
        )
        return self._answer([choice], usage=False)

    def _answer(self, choices: list[schema.CompletionChoice], *, usage: bool) -> schema.Completion:
        used = self.tally.usage(scored_only=self.scored_only) if usage else None
        return schema.Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=used)


class LegacyLogprobs:
    """Log-probabilities in OpenAI's older shape, where a place is a mapping from a token's text to its value.

    Tokens that are no text by themselves are spelled `bytes:\\xf0\\x9f`, as OpenAI spells them. Where two tokens of a
    place still read the same, the chosen one keeps its text and the others are `token_id:5`, as vLLM has it.

    Args:
        count: alternatives at each place.
        as_ids: all tokens are `token_id:5`.

    Attributes:
        shaped: what was added so far.
    """

    def __init__(self, count: int, *, as_ids: bool = False) -> None:
        self.shaped = schema.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        self._count = count
        self._as_ids = as_ids

    def add_prompt(self, echo: Echo, entries: Sequence[LogprobEntry | None]) -> None:
        """The tokens of a prompt; an entry of None is its first one."""
        for offset, entry in zip(echo.offsets, entries, strict=True):
            self._add(entry, offset) if entry is not None else self._add_first(echo.first, offset)

    def add(self, entries: Sequence[LogprobEntry], *, after: int = 0) -> None:
        """Generated tokens, whose text comes `after` so many characters."""
        for entry in entries:
            self._add(entry, after + entry.offset)

    def _add_first(self, token: tuple[int, str, Sequence[int]], offset: int) -> None:
        self.shaped.tokens.append(self._spelled(*token))
        self.shaped.token_logprobs.append(None)
        self.shaped.top_logprobs.append(None)
        self.shaped.text_offset.append(offset)

    def _add(self, entry: LogprobEntry, offset: int) -> None:
        token = self._spelled(entry.token_id, entry.token, entry.bytes)
        place = {token: entry.logprob}
        for token_id, text, raw, logprob in entry.top[: self._count]:
            if token_id != entry.token_id:
                spelled = self._spelled(token_id, text, raw)
                place[spelled if spelled not in place else f"token_id:{token_id}"] = logprob
        self.shaped.tokens.append(token)
        self.shaped.token_logprobs.append(entry.logprob)
        self.shaped.top_logprobs.append(place)
        self.shaped.text_offset.append(offset)

    def _spelled(self, token_id: int, text: str, raw: Sequence[int]) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        # A token may be U+FFFD itself.
        if "\ufffd" not in text or bytes(raw) == text.encode():
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
