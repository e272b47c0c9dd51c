"""What runs wait for: above all rows to pass through the base. Works of many runs wait here and are fused into passes.

A work is cut into parts by its own run, by its own capacity, and a part is never cut again: which parts share a pass
changes no sum, so an adapter gets the same weights whoever trains beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tenora.model.readouts.base import ReadoutKind
from tenora.model.readouts.tokens import TOKENS
from tenora.training.arena import TrainedAdapter
from tenora.training.packing import PackedRows
from tenora.training.step import Dropout, LoraDropout, Part, TokenLosses


class Objective(Protocol):
    """What is minimised, as a coefficient for the loss of each learned token.

    Attributes:
        needs_losses: whether the coefficients depend on the losses.
    """

    needs_losses: bool

    def coefficients(self, part: PackedRows, losses: Tensor) -> Tensor:
        """float32 [n] for the learned tokens of a part, whose losses float32 [n] are known only if they are needed."""


class Awaited(Protocol):
    """Something that a run cannot go on without."""

    @property
    def run_id(self) -> str:
        """Whose."""

    @property
    def done(self) -> bool:
        """Whether the run can go on."""


@dataclass(frozen=True, slots=True)
class Dropping:
    """The dropout of a work: where its parts take their numbers."""

    source: LoraDropout
    seed: int
    step: int


@dataclass(eq=False, slots=True)
class Work:
    """Rows of one run for one adapter.

    Attributes:
        run_id, share_group, weight: whose; share groups divide the base by tokens and by their weights, the runs of one
            equally.
        parts: each is run whole.
        adapter: None is the base.
        objective: None measures only; else the adapter's gradient is `gradient` and this one's afterwards.
        dropping: None if nothing is dropped.
        readout: what makes losses of the hidden states.
        recompute: keep only the inputs of layers and run each a second time in the backward pass.
        alone: its parts share a pass with no other work (after memory ran out).
        gradient: float32 [numel], what the gradient is added to, and itself not changed; None is zero.
        results: of the parts that were run.
        error: why it ended early.
    """

    run_id: str
    share_group: str
    parts: Sequence[PackedRows]
    adapter: TrainedAdapter | None
    objective: Objective | None = None
    dropping: Dropping | None = None
    readout: ReadoutKind = TOKENS
    weight: float = 1.0
    recompute: bool = False
    alone: bool = False
    gradient: Tensor | None = None
    results: list[TokenLosses] = field(default_factory=list)
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to run."""
        return self.error is not None or len(self.results) == len(self.parts)

    @property
    def kind(self) -> tuple[bool, bool, ReadoutKind, bool, bool]:
        """Works of one kind may share a pass: whether there is a gradient, whether it needs the losses first, of what,
        whether it wants an attention that takes other rows longer, and whether it has what compiled layers do not
        compute: other rows keep these layers, and so their bits and their speed.
        """
        learns = self.objective is not None
        prefixed = self.adapter is not None and self.adapter.prefix > 0
        needs_losses = self.objective is not None and self.objective.needs_losses
        has_epilogue = self.adapter is not None and self.adapter.has_epilogue
        return learns, needs_losses, self.readout, prefixed, has_epilogue

    def part(self, index: int) -> Part:
        """Part `index` as the pass wants it."""
        dropped = self.dropping
        numbers = None if dropped is None else Dropout(dropped.source, dropped.seed, dropped.step, index)
        return Part(self.parts[index], self.adapter, numbers)

    def begin(self) -> None:
        """Before its first part, also when it is run again: bring the adapter's gradient to where it begins."""
        if self.objective is not None and self.adapter is not None:
            if self.gradient is None:
                self.adapter.grad.zero_()
            else:
                self.adapter.grad.copy_(self.gradient)

    def restart(self) -> None:
        """Run it again from its first part, by itself."""
        self.results.clear()
        self.alone = True


@dataclass(slots=True)
class _Share:
    """What a share group or run has had of the base, in tokens over its weight."""

    served: float
    weight: float = 1.0


class WorkQueue:
    """All that runs wait for; works in an order that is fair between share groups, and within one between its runs.

    Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), as the serving
    scheduler has them: who comes, or comes back from waiting for something else than a pass, starts no lower than the
    least served one there is, so that idling earns no credit.

    Attributes:
        trained_tokens: learned tokens of all works with a gradient since the start.
    """

    def __init__(self) -> None:
        self.trained_tokens = 0
        self._works: list[Work] = []
        self._others: list[Awaited] = []
        self._idled: set[str] = set()  # runs that have waited for something else since their last work
        self._share_groups: dict[str, _Share] = {}
        self._runs: dict[str, _Share] = {}

    def submit(self, work: Work) -> Work:
        """Let a work wait for its turn. It is done at once if it has no parts."""
        if work.done:
            return work
        for shares, name, weight in (
            (self._share_groups, work.share_group, work.weight),
            (self._runs, work.run_id, 1.0),
        ):
            if name not in shares:
                shares[name] = _Share(min((share.served for share in shares.values()), default=0.0))
            shares[name].weight = max(weight, 1e-6)
        if work.run_id in self._idled:
            self._idled.discard(work.run_id)
            self._catch_up(self._share_groups, work.share_group, {other.share_group for other in self._works})
            self._catch_up(self._runs, work.run_id, {other.run_id for other in self._works})
        self._works.append(work)
        return work

    def watch(self, awaited: Awaited) -> None:
        """Let a run wait for something that comes from elsewhere."""
        if not awaited.done:
            self._others.append(awaited)
            self._idled.add(awaited.run_id)

    @property
    def has_work(self) -> bool:
        """Whether a pass can be made."""
        return any(not work.done for work in self._works)

    def waits(self, run_id: str) -> bool:
        """Whether a run waits, and for nothing that is done."""
        awaited: list[Awaited] = [each for each in (*self._works, *self._others) if each.run_id == run_id]
        return bool(awaited) and not any(each.done for each in awaited)

    def collect(self, run_id: str) -> None:
        """The run has been told of what is done."""
        self._works = [work for work in self._works if work.run_id != run_id or not work.done]
        self._others = [other for other in self._others if other.run_id != run_id or not other.done]

    def holds(self, work: Work) -> bool:
        """Whether somebody waits for this work."""
        return any(work is other for other in self._works)

    def abandon(self, run_id: str) -> None:
        """The run does not wait any more: it was told to end."""
        self._works = [work for work in self._works if work.run_id != run_id]
        self._others = [other for other in self._others if other.run_id != run_id]

    def forget(self, run_id: str, share_group: str, *, share_group_is_gone: bool) -> None:
        """The run has ended; nothing of it waits any more."""
        self.abandon(run_id)
        self._idled.discard(run_id)
        self._runs.pop(run_id, None)
        if share_group_is_gone:
            self._share_groups.pop(share_group, None)

    def choose(self, capacity: int) -> list[Work]:
        """Works whose next parts make the next pass: the least served one's, and others of its kind that still fit.

        An adapter with a gradient is in a pass once at most, so that the order of its sums is its own.

        Args:
            capacity: tokens of the pass; a single part may have more.
        """
        waiting = sorted((work for work in self._works if not work.done), key=self._turn)
        if not waiting:
            return []
        first, *others = waiting
        chosen, room = [first], capacity - first.parts[len(first.results)].tokens
        if not first.alone:
            for work in others:
                tokens = work.parts[len(work.results)].tokens
                twice = any(work.adapter is other.adapter for other in chosen) and work.objective is not None
                if work.kind == first.kind and not work.alone and not twice and tokens <= room:
                    chosen.append(work)
                    room -= tokens
        for work in chosen:
            self._charge(work, work.parts[len(work.results)].tokens)
        return chosen

    def finished(self, work: Work, losses: TokenLosses) -> None:
        """A part of a work was run."""
        work.results.append(losses)
        if work.objective is not None:
            self.trained_tokens += len(losses.loss)

    @staticmethod
    def _catch_up(shares: dict[str, _Share], name: str, busy: set[str]) -> None:
        """Who was away has no claim on what the busy ones had meanwhile."""
        if name not in busy:
            shares[name].served = max(shares[name].served, min((shares[other].served for other in busy), default=0.0))

    def _turn(self, work: Work) -> tuple[float, float]:
        return self._share_groups[work.share_group].served, self._runs[work.run_id].served

    def _charge(self, work: Work, tokens: int) -> None:
        for share in (self._share_groups[work.share_group], self._runs[work.run_id]):
            share.served += tokens / share.weight
