"""POST /v1/embeddings, /classify, /pooling and /v1/rewards."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from tenora.api.dependencies import ControlDep, JsonRoute, LifecycleDep, MetricsDep, may
from tenora.api.lifecycle import Lifecycle
from tenora.api.schemas import pooling as schema
from tenora.api.schemas.chat import Message
from tenora.api.sse import while_connected
from tenora.control.control import Control
from tenora.control.inference.heads import KINDS, Floats, Wanted, in_units, normalised, probabilities, unit
from tenora.control.inference.pooling import Pooled, PoolRequest
from tenora.control.inference.records import Conversation, Prompt
from tenora.control.tenancy.records import Principal
from tenora.telemetry.metrics import Metrics

router = APIRouter(tags=["inference"], route_class=JsonRoute)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request, and the parts of the server that answer it."""

    request: Request
    control: Control
    metrics: Metrics
    lifecycle: Lifecycle

    async def answer(self, caller: Principal, asked: PoolRequest, shape: Callable[[Pooled], BaseModel]) -> Response:
        """What the engine reads, shaped, as long as the client is there."""

        async def work() -> Response:
            pooled = await self.control.pooling.run(caller, asked, self.metrics.timer())
            # FastAPI would check every number of a model again.
            return Response(shape(pooled).model_dump_json(), media_type="application/json")

        return await while_connected(work(), self.request.receive, self.lifecycle)


async def _exchange(request: Request, control: ControlDep, metrics: MetricsDep, lifecycle: LifecycleDep) -> Exchange:
    return Exchange(request, control, metrics, lifecycle)


ExchangeDep = Annotated[Exchange, Depends(_exchange)]


@router.post("/v1/embeddings", response_model=schema.Embeddings)
async def create_embeddings(
    body: schema.EmbeddingRequest, caller: Annotated[Principal, may("embeddings.create")], exchange: ExchangeDep
) -> Response:
    """Vectors of length 1: of the base the mean of its hidden states, of an adapter what its embedding head gives."""
    wanted = Wanted(("embedding",), body.head, state="base")

    def shape(pooled: Pooled) -> schema.Embeddings:
        data = [
            schema.Embedding(index=index, embedding=_written(unit(vector, body.dimensions), body.encoding_format))
            for index, vector in enumerate(pooled.answers)
        ]
        return schema.Embeddings(data=data, model=pooled.model, usage=_usage(pooled))

    asked = PoolRequest(
        body.model, body.adapter_id, body.input, wanted, dimensions=body.dimensions, priority=body.priority or 0
    )
    return await exchange.answer(caller, asked, shape)


@router.post("/classify", response_model=schema.Classifications)
async def classify(
    body: schema.ClassifyRequest, caller: Annotated[Principal, may("classifications.create")], exchange: ExchangeDep
) -> Response:
    """The probabilities that an adapter's classification head gives its labels."""

    def shape(pooled: Pooled) -> schema.Classifications:
        head = pooled.found_head
        data = [
            schema.Classification(
                index=index,
                label=head.labels[int(scores.argmax())],
                probs=(scores if body.use_activation is False else probabilities(head, scores)).tolist(),
                num_classes=head.size,
            )
            for index, scores in enumerate(pooled.answers)
        ]
        return schema.Classifications(
            id=f"classify-{secrets.token_hex(16)}",
            created=int(time.time()),
            model=pooled.model,
            head=head.name,
            labels=list(head.labels),
            multi_label=head.multi_label,
            data=data,
            usage=_usage(pooled),
        )

    return await exchange.answer(caller, _of_text(body, Wanted(("classification",), body.head)), shape)


@router.post("/pooling", response_model=schema.PoolingAnswer)
async def pool(
    body: schema.PoolingRequest, caller: Annotated[Principal, may("pooling.create")], exchange: ExchangeDep
) -> Response:
    """What an adapter's head gives, as it is; or hidden states, of the base and of an adapter without heads."""
    says_which = body.pooling is not None or body.layer is not None
    wanted = Wanted(KINDS, body.head, state="always" if says_which else "any")

    def shape(pooled: Pooled) -> schema.PoolingAnswer:
        data = [
            schema.PooledData(index=index, data=_written(in_units(pooled.head, values), body.encoding_format))
            for index, values in enumerate(pooled.answers)
        ]
        return schema.PoolingAnswer(
            id=f"pool-{secrets.token_hex(16)}",
            created=int(time.time()),
            model=pooled.model,
            head=None if pooled.head is None else pooled.head.name,
            data=data,
            usage=_usage(pooled),
        )

    return await exchange.answer(caller, _of_text(body, wanted, body.layer or -1, body.pooling or "last"), shape)


@router.post("/v1/rewards", response_model=schema.Rewards)
async def reward(
    body: schema.RewardRequest, caller: Annotated[Principal, may("rewards.create")], exchange: ExchangeDep
) -> Response:
    """How an adapter's scalar head scores conversations, or answers to one prompt."""

    def shape(pooled: Pooled) -> schema.Rewards:
        head = pooled.found_head
        scores = [float(scores[0]) for scores in pooled.answers]
        data = [
            schema.Reward(index=index, score=score, normalized=normalised(head, score))
            for index, score in enumerate(scores)
        ]
        return schema.Rewards(model=pooled.model, head=head.name, data=data, usage=_usage(pooled))

    inputs = [text if isinstance(text, str) else _whole(text) for text in body.inputs]
    wanted = Wanted(("scalar",), body.head, size=1)
    asked = PoolRequest(body.model, body.adapter_id, inputs, wanted, priority=body.priority or 0)
    return await exchange.answer(caller, asked, shape)


def _of_text(
    body: schema.TextOrConversation, wanted: Wanted, layer: int = -1, pooling: Literal["last", "mean"] = "last"
) -> PoolRequest:
    inputs: Sequence[Prompt] = body.input or ()
    if body.messages is not None:
        inputs = [_whole(body.messages)]
    return PoolRequest(
        body.model,
        body.adapter_id,
        inputs,
        wanted,
        layer=layer,
        pooling=pooling,
        priority=body.priority or 0,
        param="input" if body.messages is None else "messages",
    )


def _whole(messages: Sequence[Message]) -> Conversation:
    return Conversation([message.for_template() for message in messages], whole=True)


def _written(values: Floats, encoding: schema.Encoding | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    numbers: list[float] = values.tolist()
    return numbers


def _usage(pooled: Pooled) -> schema.PoolingUsage:
    return schema.PoolingUsage(prompt_tokens=pooled.prompt_tokens, total_tokens=pooled.prompt_tokens)
