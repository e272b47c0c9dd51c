"""From a model name and a prompt to text: resolve, tokenize, submit to the engine, detokenize, stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from tenora.aclosing import aclosing
from tenora.adapters.ref import AdapterRef
from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.records import Target
from tenora.control.adapters.resolution import find_digest
from tenora.control.inference.detokenizing import ChoiceStream
from tenora.control.inference.prompts import Prompts
from tenora.control.inference.records import Delta, GenerationRequest
from tenora.control.inference.stops import Stops
from tenora.control.registry.database import Database
from tenora.control.registry.ids import random_word
from tenora.control.tenancy.records import Principal
from tenora.control.tokenizing.threads import Tokenizing
from tenora.engine.messages import Generate, SamplingParams
from tenora.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, NotFoundError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.tokenizer import Tokenizer

T = TypeVar("T")
_LONGEST_MODEL_NAME = 600
_SEEDS = 2**63
_BUFFERED_DELTAS = 64
_TOKENS_AT_ONCE = 64  # made into text in one go, if nobody sees them before: a third of a millisecond


@dataclass(slots=True)
class Inference:
    """Everything between a request and the engine's sequences.

    Attributes:
        base_id: the base model's id, which always means the base.
        admit: raises UnavailableError when no new work is taken (the server drains).
    """

    database: Database
    blobs: Blobs
    engine: AsyncEngine
    tokenizing: Tokenizing
    base_id: str
    admit: Callable[[], None]

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's."""
        return self.tokenizing.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and completion may have together."""
        return self.engine.ready.max_model_len

    async def resolve(self, principal: Principal, model: str | None, adapter_id: str | None = None) -> Target:
        """What a request's `model` and `adapter_id` mean now; never a silent fall-back to the base.

        Raises:
            ModelNotFoundError: no such model for this tenant; the same for another tenant's.
            InvalidRequestError: neither is given, or `adapter_id` beside a `model` that is not the base.
        """
        if adapter_id is not None and model not in {None, self.base_id}:
            raise InvalidRequestError(
                f"With adapter_id, model must be the base {self.base_id!r} or absent; name the adapter in one of them.",
                param="adapter_id",
            )
        wanted = model if adapter_id is None else adapter_id
        if wanted is None:
            raise InvalidRequestError(
                f"model is missing or null. Send an adapter's name, or {self.base_id!r} for the base; GET /v1/models "
                "lists them. A job's fine_tuned_model is null until it has succeeded.",
                code="missing_required_parameter",
                param="model",
            )
        shown = wanted if model is None else model
        adapter = None if wanted == self.base_id else await self._find(principal, wanted)
        return Target(
            name=shown,
            adapter=adapter,
            tenant_id=principal.tenant_id,
            # The server's choice and secret from nobody, but no client can send another: hits never cross tenants.
            cache_salt=principal.tenant_id,
        )

    @property
    def prompts(self) -> Prompts:
        """What makes prompts here and now; for a client's long text see `prepare`."""
        return Prompts(self.tokenizer, self.max_model_len)

    async def prepare(self, target: Target, characters: int, work: Callable[[Prompts], T]) -> T:
        """The result of `work`, which makes prompts of so many characters, on a thread meant for it.

        Cancelling ends it between two texts.

        Raises:
            RateLimitedError: too many of the tenant's prompts wait.
            InvalidRequestError: as `work`.
        """
        longest = self.max_model_len
        return await self.tokenizing.prompt(
            target.tenant_id, characters, lambda tokenizer: work(Prompts(tokenizer, longest))
        )

    def fit_max_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """Tokens that may be generated: as asked for, or as many as fit. ContextLengthError if they do not fit."""
        room, needed = self.max_model_len - prompt_tokens, 1 if max_tokens is None else max_tokens
        if needed > room:
            asked = f" and {max_tokens} are asked for" if max_tokens is not None else ""
            raise ContextLengthError(
                f"The model's context holds {self.max_model_len} tokens; the prompt has {prompt_tokens}{asked}. "
                "Shorten the prompt or lower max_tokens.",
                param="max_tokens" if room >= min(1, needed) else "messages",
            )
        return room if max_tokens is None else max_tokens

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Deltas of the `n` choices, as they come; the last of each choice has a finish_reason.

        Closing the iterator aborts what still runs. Errors of the engine (UnavailableError, RateLimitedError) are
        raised from the iteration and end every choice.
        """
        self.admit()
        name = f"gen-{random_word(16)}"
        choices = [self._choice(request, index, f"{name}-{index}") for index in range(request.n)]
        merged = choices[0] if len(choices) == 1 else _interleave(choices)
        with self._kept(request.target):
            async with contextlib.aclosing(merged):
                async for delta in merged:
                    yield delta

    @contextlib.contextmanager
    def _kept(self, target: Target) -> Iterator[None]:
        """Keep the version's files until the request ends, also if the adapter is deleted while it waits for a slot."""
        with contextlib.ExitStack() as stack:
            if target.adapter is not None:
                try:
                    stack.enter_context(self.blobs.use(target.adapter.digest))
                except NotFoundError as error:
                    raise ModelNotFoundError(target.name) from error  # deleted since it was resolved
            yield

    async def _choice(self, request: GenerationRequest, index: int, request_id: str) -> AsyncGenerator[Delta, None]:
        stream = ChoiceStream(index, request, self.tokenizer)
        command = Generate(
            request_id=request_id,
            token_ids=list(request.prompt_token_ids),
            sampling=_of_choice(request.sampling, stream.stops, index),
            adapter=request.target.adapter,
            group=request.target.tenant_id,
            cache_salt=request.target.cache_salt,
            priority=request.priority,
        )
        # A stop string is to be found before the engine goes on for long.
        batch = 1 if request.at_once or stream.stops.strings else _TOKENS_AT_ONCE
        async with aclosing(self.engine.generate(command, batch=batch)) as outputs:
            async for output in outputs:
                delta = stream.push(output)
                if delta is not None:
                    yield delta
                if stream.finished:
                    return

    async def _find(self, principal: Principal, name: str) -> AdapterRef:
        if len(name) > _LONGEST_MODEL_NAME:
            raise InvalidRequestError(f"A model's name has at most {_LONGEST_MODEL_NAME} characters.", param="model")
        async with self.database.read() as session:
            digest = await find_digest(session, principal, name)
        if digest is None:
            raise ModelNotFoundError(name)
        try:
            return self.blobs.store.ref(digest)
        except NotFoundError as error:
            raise ModelNotFoundError(name) from error  # deleted since the row was read


def _of_choice(sampling: SamplingParams, stops: Stops, index: int) -> SamplingParams:
    """With every token that ends it. Choices of one seeded request differ, and each is the same every time."""
    seed = sampling.seed if sampling.seed is None or index == 0 else (sampling.seed + index) % _SEEDS
    return msgspec.structs.replace(sampling, stop_token_ids=tuple(sorted(stops.tokens)), seed=seed)


async def _interleave(choices: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Items of all generators in the order of their arrival; the first error ends them all."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue(_BUFFERED_DELTAS)

    async def pump(choice: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(choice):
                async for delta in choice:
                    await queue.put(delta)
        except Exception as error:  # noqa: BLE001 (handed to the reader below, whatever it is)
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
