"""Sequences that training runs wait for: they are scheduled with everybody's requests, in the run's share group.

An adapter in training has no digest, because no version is what it is now. Each time that it is sampled it gets a name
of its own, under which a copy of it takes a slot and the prefix cache keeps its blocks, until the last of its sequences
has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Abort, EvictAdapter, Generate, SequenceFailed, TokenLogprob
from tenora.engine.outputs import Item
from tenora.errors import TrainingError
from tenora.training.commands import SampledSequence
from tenora.training.samples import Samples


@dataclass(slots=True)
class _Growing:
    """A sequence under way: the samples that it belongs to, its place there, and what has come of it."""

    samples: Samples
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Rollouts:
    """A `tenora.training.samples.Sampler` on an engine."""

    def __init__(
        self,
        add: Callable[[Generate | Abort | EvictAdapter], None],
        offer: Callable[[str, PreparedAdapter], None],
    ) -> None:
        """Nothing is under way.

        Args:
            add: gives the engine a command.
            offer: lets an adapter be loaded by a name without a file, until it is evicted.
        """
        self._add, self._offer = add, offer
        self._sequences: dict[str, _Growing] = {}
        self._started = 0

    def start(self, samples: Samples) -> None:
        """See `Sampler`."""
        self._started += 1
        name = f"run:{samples.run_id}:{self._started}"
        adapter = None
        if samples.policy is not None:
            self._offer(name, samples.policy)
            adapter = AdapterRef(digest=name, path="")
        for index, prompt in enumerate(samples.prompts):
            sampling = samples.sampling
            if sampling.seed is not None:
                sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
            request_id = f"{name}:{index}"
            self._sequences[request_id] = _Growing(samples, index)
            self._add(
                Generate(
                    request_id=request_id,
                    token_ids=list(prompt),
                    sampling=sampling,
                    adapter=adapter,
                    share_group=samples.share_group,
                    weight=samples.weight,
                    cache_salt=name,
                )
            )
        self._add(EvictAdapter(name))  # once its sequences have ended

    def cancel(self, run_id: str) -> None:
        """See `Sampler`."""
        for request_id, growing in list(self._sequences.items()):
            if growing.samples.run_id == run_id:
                self._abort(request_id)

    def take(self, items: list[Item]) -> list[Item]:
        """Keep what runs wait for, and give back the others' outputs."""
        own = [item for item in items if item.request_id in self._sequences]
        if not own:
            return items
        rest = [item for item in items if item.request_id not in self._sequences]
        for item in own:
            if (growing := self._sequences.get(item.request_id)) is not None:  # else another one's failure has ended it
                self._keep(growing, item)
        return rest

    def _keep(self, growing: _Growing, item: Item) -> None:
        if isinstance(item, SequenceFailed):
            growing.samples.error = TrainingError(item.message, code=item.code)
            for request_id, other in list(self._sequences.items()):
                if other.samples is growing.samples:
                    self._abort(request_id)
            return
        growing.token_ids += item.token_ids
        growing.logprobs += item.logprobs or []
        if item.finish_reason is not None:
            del self._sequences[item.request_id]
            growing.samples.sequences[growing.index] = SampledSequence(
                token_ids=growing.token_ids,
                logprobs=growing.logprobs,
                finish_reason=item.finish_reason,
                stop_token_id=item.stop_token_id,
            )

    def _abort(self, request_id: str) -> None:
        del self._sequences[request_id]
        self._add(Abort(request_id))
