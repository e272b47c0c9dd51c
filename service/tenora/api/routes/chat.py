"""POST /v1/chat/completions."""

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
from tenora.api.generation import collect, inference_request, prompt_logprobs, usage
from tenora.api.schemas import chat as schema
from tenora.api.sse import EventStream, while_connected
from tenora.control.inference.inference import Submission
from tenora.control.inference.records import Conversation, LogprobEntry
from tenora.control.tenancy.records import Principal

router = APIRouter(tags=["inference"], route_class=JsonRoute)


@router.post("/v1/chat/completions", response_model=schema.ChatCompletion)
async def create_chat_completion(
    body: schema.ChatCompletionRequest,
    request: Request,
    caller: Annotated[Principal, may("chat.create")],
    control: ControlDep,
    metrics: MetricsDep,
    lifecycle: LifecycleDep,
) -> schema.ChatCompletion | EventStream:
    """Answer a conversation, with the base or an adapter. With `stream` the answer comes as server-sent events."""
    timer = metrics.timer()
    asked = inference_request(
        body,
        [Conversation([message.for_template() for message in body.messages])],
        max_tokens=body.token_limit,
        logprobs=body.alternatives,
        prompt_logprobs=body.prompt_logprobs,
    )

    async def submit() -> ChatAnswer:
        return ChatAnswer(await control.inference.submit(caller, asked, timer), body)

    async def chunks() -> AsyncIterator[str]:
        return (await submit()).chunks()

    if body.stream:
        return EventStream(chunks, lifecycle)

    async def answer() -> schema.ChatCompletion:
        return await (await submit()).complete()

    return await while_connected(answer(), request.receive, lifecycle)


@dataclass(slots=True)
class ChatAnswer:
    """Shapes deltas into the answer or its chunks, which share id, time and the model's name as it was asked for."""

    submission: Submission
    body: schema.ChatCompletionRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def as_ids(self) -> bool:
        """Whether tokens of logprobs show as `token_id:5`."""
        return bool(self.body.return_tokens_as_token_ids)

    async def complete(self) -> schema.ChatCompletion:
        """The whole answer, once it is there."""
        collected = await collect(self.submission)
        choices = [
            schema.ChatChoice(
                index=index,
                message=schema.ChatMessage(content=choice.text),
                logprobs=token_logprobs(choice.logprobs, as_ids=self.as_ids) if self.body.logprobs else None,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for (_, index), choice in sorted(collected.choices.items())
        ]
        return schema.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.submission.model,
            choices=choices,
            usage=usage(self.submission.meter),
            prompt_logprobs=prompt_logprobs(collected.prompt_logprobs.get(0), self.body.prompt_logprobs),
        )

    async def chunks(self) -> AsyncIterator[str]:
        """The JSON of each event: the roles, the text as it comes, each choice's end, the usage if wanted."""
        begun, logprobs = False, bool(self.body.logprobs)
        texts = TextEvents(lambda index, text: self._chunk(schema.ChunkChoice(index=index, delta={"content": text})))
        async with aclosing(self.submission.deltas) as items:
            async for _, delta in items:
                if not begun:
                    begun = True
                    for index in range(self.body.choices):
                        start = schema.ChunkChoice(index=index, delta={"role": "assistant", "content": ""})
                        yield self._chunk(start).model_dump_json()
                if logprobs and (delta.text or delta.logprobs):
                    content = token_logprobs(delta.logprobs or (), as_ids=self.as_ids)
                    choice = schema.ChunkChoice(index=delta.index, delta={"content": delta.text}, logprobs=content)
                    yield self._chunk(choice).model_dump_json()
                elif delta.text:
                    yield texts(delta.index, delta.text)
                if delta.finish_reason is not None:
                    end = schema.ChunkChoice(
                        index=delta.index, delta={}, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
                    )
                    yield self._chunk(end).model_dump_json()
        if self.body.include_usage:
            used = usage(self.submission.meter)
            chunk = schema.ChatChunk(
                id=self.id, created=self.created, model=self.submission.model, choices=[], usage=used
            )
            yield chunk.model_dump_json()

    def _chunk(self, choice: schema.ChunkChoice) -> schema.ChatChunk:
        return schema.ChatChunk(id=self.id, created=self.created, model=self.submission.model, choices=[choice])


def token_logprobs(entries: Sequence[LogprobEntry], *, as_ids: bool = False) -> schema.ChatLogprobs:
    """Log-probabilities in OpenAI's chat shape; with `as_ids` tokens show as vLLM's `token_id:5`."""
    return schema.ChatLogprobs(
        content=[
            schema.TokenLogprob(
                token=f"token_id:{entry.token_id}" if as_ids else entry.token,
                logprob=entry.logprob,
                bytes=list(entry.bytes),
                top_logprobs=[
                    schema.TopLogprob(
                        token=f"token_id:{token_id}" if as_ids else token, logprob=logprob, bytes=list(raw)
                    )
                    for token_id, token, raw, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )
