"""From a model's name and prompts to text: resolve, tokenize, submit to the engine, detokenize, stop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from tenora.aclosing import aclosing
from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.records import Target
from tenora.control.inference.detokenizing import ChoiceStream
from tenora.control.inference.echoes import Echo, echo_of
from tenora.control.inference.merging import merged
from tenora.control.inference.metering import Meter, Timer
from tenora.control.inference.naming import Names
from tenora.control.inference.prompts import Prompts
from tenora.control.inference.records import (
    AskedComposition,
    Conversation,
    Delta,
    GenerationRequest,
    InferenceRequest,
    Prompt,
)
from tenora.control.inference.stops import Stops
from tenora.control.registry.database import Database, Session
from tenora.control.registry.ids import random_word
from tenora.control.tenancy.erasure import AfterCommit
from tenora.control.tenancy.records import Principal
from tenora.control.tokenizing.threads import Tokenizing
from tenora.engine.messages import Generate, SamplingParams
from tenora.errors import ContextLengthError, ModelNotFoundError, NotFoundError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.tokenizer import Tokenizer

_SEEDS = 2**63
_TURN = 64  # characters that a template writes around a message, or more than it does
_TOKENS_AT_ONCE = 64  # made into text in one go, if nobody sees them before: a third of a millisecond


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that is ready to run.

    Attributes:
        model: its name as it was asked for.
        deltas: of all choices as they come, each with its prompt's index. Closing it aborts everything that still runs.
        meter: counts them.
        echoes: the prompts as text, if they are wanted.
    """

    model: str
    deltas: AsyncIterator[tuple[int, Delta]]
    meter: Meter
    echoes: Sequence[Echo] | None


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

    async def forget(self, session: Session, tenant_id: str) -> AfterCommit:  # noqa: ARG002 - `Holder.forget`
        """What is to go with a tenant: what the prefix cache remembers of its prompts, to the base's too."""

        async def let_go() -> None:
            await self.engine.forget_prefixes(tenant_id)

        return let_go

    async def resolve(
        self,
        principal: Principal,
        model: str | None,
        adapter_id: str | None = None,
        composition: AskedComposition | None = None,
    ) -> Target:
        """What the names of a request mean now (`Names.resolve`)."""
        return await Names(self.database, self.blobs, self.base_id).resolve(principal, model, adapter_id, composition)

    @property
    def prompts(self) -> Prompts:
        """What makes prompts here and now; a client's long text goes to threads of its own (`submit`)."""
        return Prompts(self.tokenizer, self.max_model_len)

    async def submit(self, principal: Principal, request: InferenceRequest, timer: Timer) -> Submission:
        """Find the model, make tokens of the prompts, and have them completed. Nothing runs before deltas are read.

        Cancelling ends it between two prompts.

        Raises:
            ModelNotFoundError, InvalidRequestError: as `resolve`; also a prompt or a token id that is none.
            ContextLengthError: a prompt does not fit, alone or with what is asked for.
            RateLimitedError: too many of the tenant's prompts wait.
        """
        target = await self.resolve(principal, request.model, request.adapter_id, request.composition)
        longest, characters = self.max_model_len, sum(map(characters_of, request.prompts))

        def prepare(tokenizer: Tokenizer) -> list[tuple[GenerationRequest, Echo | None]]:
            prompts = Prompts(tokenizer, longest)
            return [self._prepared(request, target, prompt, prompts) for prompt in request.prompts]

        prepared = await self.tokenizing.prompt(target.tenant_id, characters, prepare)
        meter = Meter(timer, len(prepared) * request.n, target.composed)
        deltas = meter.counted(self.generate([generation for generation, _ in prepared]))
        return Submission(target.name, deltas, meter, [echo for _, echo in prepared if echo is not None] or None)

    def _prepared(
        self, request: InferenceRequest, target: Target, prompt: Prompt, prompts: Prompts
    ) -> tuple[GenerationRequest, Echo | None]:
        ids = prompts.of(prompt)
        param = "messages" if isinstance(prompt, Conversation) else "prompt"
        sampling = request.sampling(self.fit_max_tokens(len(ids), request.max_tokens, param))
        prompts.check_ids(sampling.logit_bias, "logit_bias")
        prompts.check_ids(sampling.stop_token_ids, "stop_token_ids")
        generation = GenerationRequest(
            target=target,
            prompt_token_ids=ids,
            sampling=sampling,
            n=request.n,
            stop=request.stop,
            include_stop=request.include_stop,
            ignore_eos=request.ignore_eos,
            skip_special_tokens=request.skip_special_tokens,
            priority=request.priority,
            at_once=request.at_once,
        )
        if not request.echo or isinstance(prompt, Conversation):
            return generation, None
        return generation, echo_of(prompts.tokenizer, prompt, ids, offsets=request.echo_offsets)

    def fit_max_tokens(self, prompt_tokens: int, max_tokens: int | None, param: str = "messages") -> int:
        """Tokens that may be generated: as asked for, or as many as fit. ContextLengthError if they do not fit.

        `param` is the field that has the prompt.
        """
        room, needed = self.max_model_len - prompt_tokens, 1 if max_tokens is None else max_tokens
        if needed > room:
            asked = f" and {max_tokens} are asked for" if max_tokens is not None else ""
            raise ContextLengthError(
                f"The model's context holds {self.max_model_len} tokens; the prompt has {prompt_tokens}{asked}. "
                "Shorten the prompt or lower max_tokens.",
                param="max_tokens" if room >= min(1, needed) else param,
            )
        return room if max_tokens is None else max_tokens

    def generate(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of all choices of all requests, as they come, each with its request's index.

        The last of each choice has a finish_reason. Closing the iterator aborts what still runs. Errors of the engine
        (UnavailableError, RateLimitedError) are raised from the iteration and end every choice.
        """
        self.admit()
        name = f"gen-{random_word(16)}"
        return merged(
            [
                (source, self._choice(request, index, f"{name}-{source}-{index}"))
                for source, request in enumerate(requests)
                for index in range(request.n)
            ]
        )

    @contextlib.contextmanager
    def kept(self, target: Target) -> Iterator[None]:
        """Keep the versions' files until the request ends, also if one is deleted while it waits for a slot."""
        with contextlib.ExitStack() as stack:
            for digest in () if target.adapter is None else target.adapter.versions:
                try:
                    stack.enter_context(self.blobs.use(digest))
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
            share_group=request.target.tenant_id,
            cache_salt=request.target.cache_salt,
            priority=request.priority,
        )
        # A stop string is to be found before the engine goes on for long.
        batch = 1 if request.at_once or stream.stops.strings else _TOKENS_AT_ONCE
        with self.kept(request.target):
            async with aclosing(self.engine.generate(command, batch=batch)) as outputs:
                async for output in outputs:
                    delta = stream.push(output)
                    if delta is not None:
                        yield delta
                    if stream.finished:
                        return


def _of_choice(sampling: SamplingParams, stops: Stops, index: int) -> SamplingParams:
    """With every token that ends it. Choices of one seeded request differ, and each is the same every time."""
    seed = sampling.seed if sampling.seed is None or index == 0 else (sampling.seed + index) % _SEEDS
    return msgspec.structs.replace(sampling, stop_token_ids=tuple(sorted(stops.tokens)), seed=seed)


def characters_of(prompt: Prompt) -> int:
    """How long it takes to make tokens of a prompt: all that a template may write of it counts, and what it adds."""
    if not isinstance(prompt, Conversation):
        return len(prompt)
    return sum(
        _TURN + sum(len(value) for value in message.values() if isinstance(value, str)) for message in prompt.messages
    )
