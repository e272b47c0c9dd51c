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
from tenora.api.generation import Choice, Collected, collect, inference_request, prompt_logprobs, usage
from tenora.api.schemas import completions as schema
from tenora.api.sse import EventStream, while_connected
from tenora.control.inference.echoes import Echo
from tenora.control.inference.inference import Submission
from tenora.control.inference.records import LogprobEntry
from tenora.control.tenancy.records import Principal

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
    asked = inference_request(
        body,
        body.prompt,
        max_tokens=body.token_limit,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_alternatives,
        echo=bool(body.echo),
    )

    async def submit() -> CompletionAnswer:
        return CompletionAnswer(await control.inference.submit(caller, asked, timer), body)

    async def chunks() -> AsyncIterator[str]:
        return (await submit()).chunks()

    if body.stream:
        return EventStream(chunks, lifecycle)

    async def answer() -> schema.Completion:
        return await (await submit()).complete()

    return await while_connected(answer(), request.receive, lifecycle)


@dataclass(slots=True)
class CompletionAnswer:
    """Shapes deltas into the answer or its chunks, which share id, time and the model's name as it was asked for."""

    submission: Submission
    body: schema.CompletionRequest
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def scored_only(self) -> bool:
        """Nothing is generated; only the prompt is looked at."""
        return self.body.token_limit == 0

    async def complete(self) -> schema.Completion:
        """The whole answer, once it is there."""
        collected = await collect(self.submission)
        choices = [
            self._choice(source, index, choice, collected)
            for (source, index), choice in sorted(collected.choices.items())
        ]
        return self._answer(choices, told=True)

    def _choice(self, source: int, index: int, choice: Choice, collected: Collected) -> schema.CompletionChoice:
        echo = self.submission.echoes[source] if self.submission.echoes is not None else None
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

    async def chunks(self) -> AsyncIterator[str]:
        """The JSON of each event: the echo if wanted, the text as it comes, then the usage if it is wanted."""
        begun: set[int] = set()
        echoes = self.submission.echoes
        texts = TextEvents(self._chunk)
        async with aclosing(self.submission.deltas) as items:
            async for source, delta in items:
                index = source * self.body.choices + delta.index
                if echoes is not None and index not in begun:
                    begun.add(index)
                    yield texts(index, echoes[source].text)
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
            yield self._answer([], told=True).model_dump_json()

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
        return self._answer([choice], told=False)

    def _answer(self, choices: list[schema.CompletionChoice], *, told: bool) -> schema.Completion:
        used = usage(self.submission.meter, scored_only=self.scored_only) if told else None
        return schema.Completion(
            id=self.id, created=self.created, model=self.submission.model, choices=choices, usage=used
        )


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
