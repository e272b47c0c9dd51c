"""From a model's name and texts to pooled hidden states, or to what a head makes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tenora.adapters.heads import Head
from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.records import Target
from tenora.control.inference.heads import Floats, Wanted
from tenora.control.inference.inference import Inference, characters_of
from tenora.control.inference.metering import Timer
from tenora.control.inference.prompts import Prompts
from tenora.control.inference.records import Prompt
from tenora.control.registry.ids import random_word
from tenora.control.tenancy.records import Principal
from tenora.engine.messages import Pool, Pooling
from tenora.errors import InvalidRequestError

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

AT_ONCE = 64
"""Inputs of one request that are in the engine at the same time."""
MAX_NUMBERS = 2**21
"""Of one answer: what is made of them in the API process holds up everybody for as long."""


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """What a client asks for, before anything is known of the model that it names.

    Attributes:
        model, adapter_id: the base, or an adapter by any of its names.
        inputs: each of them is read.
        wanted: the head, or the state.
        layer, pooling: which state, where it is wanted; as of `tenora.engine.messages.Pool`.
        dimensions: how many numbers of an answer will be told; None: all.
        param: the field that has the inputs.
    """

    model: str | None
    adapter_id: str | None
    inputs: Sequence[Prompt]
    wanted: Wanted
    layer: int = -1
    pooling: Pooling = "mean"
    dimensions: int | None = None
    priority: int = 0
    param: str = "input"


@dataclass(slots=True)
class Pooled:
    """What became of a request.

    Attributes:
        model: its name as it was asked for.
        head: whose scores the answers are; None: they are hidden states.
        answers: of each input, in their order.
        prompt_tokens: of all inputs.
        cached_tokens: those of them that were found in the prefix cache.
    """

    model: str
    head: Head | None
    answers: list[Floats]
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def found_head(self) -> Head:
        """The head, of a request that could not do without. ValueError if there is none."""
        if self.head is None:
            raise ValueError("hidden states have no head.")
        return self.head


class Pooler:
    """Everything between a request for pooled states or scores and the engine's sequences."""

    def __init__(self, inference: Inference, blobs: Blobs) -> None:
        self._inference, self._blobs = inference, blobs

    async def run(self, principal: Principal, request: PoolRequest, timer: Timer) -> Pooled:
        """Find the model and its head, make tokens of the inputs, and have them read. Cancelling ends all of it.

        Raises:
            ModelNotFoundError, InvalidRequestError: as `Inference.resolve`; no such head; an input that is none.
            ContextLengthError: an input does not fit.
            RateLimitedError, UnavailableError: as of a generation.
        """
        inference = self._inference
        target = await inference.resolve(principal, request.model, request.adapter_id)
        with inference.kept(target):
            head = request.wanted.choose(target.name, await self._heads(target))
            self._check_size(request, head)
            characters = sum(map(characters_of, request.inputs))
            prompts = await inference.tokenizing.prompt(
                target.tenant_id, characters, lambda tokenizer: self._tokenized(tokenizer, request)
            )
            inference.admit()
            return await self._read(target, head, request, prompts, timer)

    async def _heads(self, target: Target) -> Sequence[Head] | None:
        """Those of the adapter; None for the base."""
        if target.adapter is None:
            return None
        shape = await self._blobs.shape(target.adapter.digest)
        return () if shape is None else shape.heads  # of one that cannot be read the engine says what is wrong

    def _check_size(self, request: PoolRequest, head: Head | None) -> None:
        """Raise InvalidRequestError unless the answers have as many numbers as are asked for, and not too many."""
        size = self._inference.engine.ready.hidden_size if head is None or not head.size else head.size
        if request.dimensions is not None and request.dimensions > size:
            raise InvalidRequestError(
                f"dimensions is {request.dimensions}, and this model gives {size} numbers; ask for at most as many.",
                param="dimensions",
            )
        numbers = len(request.inputs) * (request.dimensions or size)
        if numbers > MAX_NUMBERS:
            raise InvalidRequestError(
                f"{len(request.inputs)} inputs give {numbers} numbers, and one answer holds {MAX_NUMBERS}; send fewer "
                "inputs at a time.",
                param=request.param,
            )

    def _tokenized(self, tokenizer: Tokenizer, request: PoolRequest) -> list[list[int]]:
        found: list[list[int]] = []
        for index, text in enumerate(request.inputs):
            param = request.param if len(request.inputs) == 1 else f"{request.param}[{index}]"
            try:
                found.append(Prompts(tokenizer, self._inference.max_model_len, param).of(text))
            except InvalidRequestError as error:
                error.param = param
                raise
        return found

    async def _read(
        self, target: Target, head: Head | None, request: PoolRequest, prompts: Sequence[list[int]], timer: Timer
    ) -> Pooled:
        """Every prompt's answer, some prompts at a time."""
        name = f"pool-{random_word(16)}"
        answers: dict[int, Floats] = {}
        used = Pooled(target.name, head, [], prompt_tokens=sum(map(len, prompts)))

        async def read(waiting: Iterator[tuple[int, list[int]]]) -> None:
            for index, tokens in waiting:
                command = _command(f"{name}-{index}", tokens, target, head, request)
                output = await self._inference.engine.pool(command)
                if not answers:
                    timer.token(output.queue_seconds)
                used.cached_tokens += output.cached_tokens
                answers[index] = np.frombuffer(output.pooled or b"", np.float32)

        waiting = iter(list(enumerate(prompts)))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(AT_ONCE, len(prompts))):
                    group.create_task(read(waiting))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others were only cancelled because of it
        except asyncio.CancelledError:
            read_tokens = sum(len(prompts[index]) for index in answers)
            timer.finish(read_tokens, 0, ["stop"] * len(answers) + ["abort"] * (len(prompts) - len(answers)))
            raise
        timer.finish(used.prompt_tokens, 0, ["stop"] * len(prompts))
        used.answers = [answers[index] for index in range(len(prompts))]
        return used


def _command(request_id: str, token_ids: list[int], target: Target, head: Head | None, request: PoolRequest) -> Pool:
    return Pool(
        request_id=request_id,
        token_ids=token_ids,
        layer=request.layer if head is None else head.layer,
        pooling=request.pooling if head is None else head.pooling,
        head=(head.start, head.stop) if head is not None and head.size else None,
        adapter=target.adapter,
        share_group=target.tenant_id,
        cache_salt=target.cache_salt,
        priority=request.priority,
    )
