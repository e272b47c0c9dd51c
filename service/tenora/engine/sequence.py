"""A sequence: one request's tokens on their way through the engine."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from tenora.adapters.invocation import NEVER
from tenora.engine.blocks import BlockHash, chain_hash, root_hash
from tenora.engine.messages import Generate, Pool, SamplingParams, TokenLogprob
from tenora.engine.running_sum import RunningSum

GREEDY_BELOW = 1e-5  # temperature
_NOTHING = SamplingParams(max_tokens=0, temperature=0.0)  # is sampled of a prompt that is pooled


@dataclass(slots=True, eq=False)
class SequenceState:
    """Mutable state of one request. Only the scheduler and the engine change it.

    Attributes:
        arrival: order of arrival, the tie-breaker of priorities.
        stop_ids: tokens that end it.
        seed: the request's, or a random one: noise depends on it and on the position alone.
        token_ids: prompt, then output.
        length_class: `Rotary.length_class` of the prompt.
        num_computed: leading tokens whose keys and values lie in the cache.
        charged: leading tokens that its share group has paid for; recomputation is not charged again.
        slot: adapter slot while running with an adapter, else -1.
        adapted_from: the first token that its adapter acts on; known once it has run with a slot, as is `offset`.
        offset: virtual tokens of its adapter before it: token i lies at position offset + i.
        cached_tokens: prompt tokens found in the prefix cache at first admission; None before it.
        reported: whether a first output was emitted.
        greedy: its next token is the likeliest one.
        plain: greedy, and the logits are neither changed before nor told: the arg max is all of the sampling.
        arrived: when it came, on the monotonic clock.
        queue_seconds: how long it waited for its first admission; None before it.
        prompt_logprobs: entries so far, if asked for.
        sampling: how its next token is chosen.
        summed: of the hidden states, if their mean is asked for.
        id: the request's.
        digest: the adapter's, or "" for the base.
        order: sorting key within a share group: lower runs earlier.
    """

    request: Generate | Pool
    arrival: int
    stop_ids: frozenset[int]
    seed: int
    token_ids: list[int]
    length_class: int = 0
    num_computed: int = 0
    charged: int = 0
    slot: int = -1
    adapted_from: int = 0
    offset: int = 0
    cached_tokens: int | None = None
    reported: bool = False
    greedy: bool = False
    plain: bool = False
    arrived: float = field(default_factory=time.monotonic)
    queue_seconds: float | None = None
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    sampling: SamplingParams = _NOTHING
    summed: RunningSum = field(default_factory=RunningSum)
    id: str = field(init=False)
    digest: str = field(init=False)
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.request.request_id
        self.digest = self.request.adapter.digest if self.request.adapter else ""
        self.order = (self.request.priority, self.arrival)

    @classmethod
    def start(cls, request: Generate | Pool, arrival: int, length_class: int = 0) -> SequenceState:
        """Make the sequence of a request."""
        sampling = request.sampling if isinstance(request, Generate) else _NOTHING
        stops = frozenset(sampling.stop_token_ids)
        greedy = sampling.temperature < GREEDY_BELOW
        return cls(
            request=request,
            arrival=arrival,
            stop_ids=stops,
            greedy=greedy,
            plain=greedy and not (sampling.min_tokens and stops) and _leaves_logits_alone(sampling),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            token_ids=list(request.token_ids),
            length_class=length_class,
            prompt_logprobs=_unscored(sampling, len(request.token_ids)),
            sampling=sampling,
        )

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens that must be computed before the next one can be sampled (1 while decoding)."""
        return len(self.token_ids) - self.num_computed

    @property
    def length(self) -> int:
        """Positions that it fills once all its tokens are computed."""
        return self.offset + len(self.token_ids)

    @property
    def context(self) -> int:
        """Positions that are filled, virtual tokens included."""
        return self.offset + self.num_computed

    @property
    def alike(self) -> int:
        """How many of the remaining tokens are computed as the next one is: with the adapter, or without."""
        end = self.adapted_from if self.num_computed < self.adapted_from else NEVER
        return min(self.remaining, end - self.num_computed)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt tokens still have to be scored."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    @property
    def num_cacheable(self) -> int:
        """Leading tokens that the prefix cache may stand for: of those after them the hidden states are needed."""
        if isinstance(self.request, Pool) and self.request.pooling == "mean":
            return self.summed.tokens  # what a preemption took, and no hit of another request's
        known = self.prompt_logprobs if self.wants_prompt_logprobs else self.token_ids
        return len(known or ()) - 1

    def hashes(self, block_size: int, num_tokens: int) -> list[BlockHash]:
        """Hash chain of the full blocks up to the first `num_tokens` tokens, extended as far as needed and kept.

        Blocks before those that the adapter acts in have the base's hashes. Virtual tokens have no ids: the digest
        says what they are.
        """
        full = (self.offset + num_tokens) // block_size
        while len(self.block_hashes) < full:
            start = len(self.block_hashes) * block_size - self.offset
            parent = self.block_hashes[-1] if self.block_hashes else self._root()
            tokens = self.token_ids[max(start, 0) : max(start + block_size, 0)]
            inside = self.adapted_from - start
            begins = self.adapted_from > 0 and 0 <= inside < block_size
            self.block_hashes.append(chain_hash(parent, tokens, (self.digest, inside) if begins else None))
        return self.block_hashes[:full]

    def _root(self) -> BlockHash:
        digest = "" if self.adapted_from > 0 else self.digest
        return root_hash(self.request.cache_salt, digest, self.length_class)


def _unscored(sampling: SamplingParams, prompt_tokens: int) -> list[TokenLogprob | None] | None:
    """The entries of the prompt tokens that are not to be scored; None if none are."""
    if sampling.prompt_logprobs is None:
        return None
    return [None] * min(sampling.prompt_logprobs_from, prompt_tokens)


def _leaves_logits_alone(sampling: SamplingParams) -> bool:
    """Whether no penalty or bias changes the logits and no log-probability is asked for."""
    unpenalised = sampling.repetition_penalty == 1.0 and not (sampling.frequency_penalty or sampling.presence_penalty)
    return unpenalised and not sampling.logit_bias and sampling.logprobs is None
