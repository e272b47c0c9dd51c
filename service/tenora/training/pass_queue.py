"""What runs ask of the base: rows to pass through it. Works of many runs wait here and are fused into passes.

A work is cut into parts by its own run, by its own capacity, and a part is never cut again: which parts share a pass
changes no sum, so an adapter gets the same weights whoever trains beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

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
        run_id, group, weight: whose; groups share the base by tokens and by their weights, the runs of a group equally.
        parts: each is run whole.
        adapter: None is the base.
        objective: None measures only; else the gradient is added to the adapter's, which is cleared before.
        dropping: None if nothing is dropped.
        recompute: keep only the inputs of layers and run each a second time in the backward pass.
        alone: its parts share a pass with no other work (after memory ran out).
        results: of the parts that were run.
        error: why it ended early.
    """

    run_id: str
    group: str
    parts: Sequence[PackedRows]
    adapter: TrainedAdapter | None
    objective: Objective | None = None
    dropping: Dropping | None = None
    weight: float = 1.0
    recompute: bool = False
    alone: bool = False
    results: list[TokenLosses] = field(default_factory=list)
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to run."""
        return self.error is not None or len(self.results) == len(self.parts)

    @property
    def kind(self) -> tuple[bool, bool]:
        """Works of one kind may share a pass: whether there is a gradient, and whether it needs the losses first."""
        return self.objective is not None, self.objective is not None and self.objective.needs_losses

    def part(self, index: int) -> Part:
        """Part `index` as the pass wants it."""
        dropped = self.dropping
        numbers = None if dropped is None else Dropout(dropped.source, dropped.seed, dropped.step, index)
        return Part(self.parts[index], self.adapter, numbers)

    def restart(self) -> None:
        """Run it again from its first part, by itself."""
        self.results.clear()
        self.alone = True


@dataclass(slots=True)
class _Share:
    """What a group or run has had of the base, in tokens over its weight."""

    served: float
    weight: float = 1.0


class WorkQueue:
    """Works that wait, in an order that is fair between groups, and within a group between its runs.

    Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024), as the serving
    scheduler has them: who comes starts no lower than the least served one there is, so that idling earns no credit.

    Attributes:
        trained_tokens: learned tokens of all works with a gradient since the start.
    """

    def __init__(self) -> None:
        self.trained_tokens = 0
        self._works: list[Work] = []
        self._groups: dict[str, _Share] = {}
        self._runs: dict[str, _Share] = {}

    def submit(self, work: Work) -> Work:
        """Let a work wait for its turn. It is done at once if it has no parts."""
        if work.done:
            return work
        for shares, name, weight in ((self._groups, work.group, work.weight), (self._runs, work.run_id, 1.0)):
            if name not in shares:
                shares[name] = _Share(min((share.served for share in shares.values()), default=0.0))
            shares[name].weight = max(weight, 1e-6)
        self._works.append(work)
        return work

    def waits(self, run_id: str) -> bool:
        """Whether all that a run could go on with is still to be run."""
        works = [work for work in self._works if work.run_id == run_id]
        return bool(works) and not any(work.done for work in works)

    def collect(self, run_id: str) -> None:
        """The run has been told of its works that are done."""
        self._works = [work for work in self._works if work.run_id != run_id or not work.done]

    def holds(self, work: Work) -> bool:
        """Whether somebody waits for this work."""
        return any(work is other for other in self._works)

    def abandon(self, run_id: str) -> None:
        """The run does not wait any more: it was told to end."""
        self._works = [work for work in self._works if work.run_id != run_id]

    def forget(self, run_id: str, group: str, *, group_is_gone: bool) -> None:
        """The run has ended; nothing of it waits any more."""
        self.abandon(run_id)
        self._runs.pop(run_id, None)
        if group_is_gone:
            self._groups.pop(group, None)

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

    def _turn(self, work: Work) -> tuple[float, float]:
        return self._groups[work.group].served, self._runs[work.run_id].served

    def _charge(self, work: Work, tokens: int) -> None:
        for share in (self._groups[work.group], self._runs[work.run_id]):
            share.served += tokens / share.weight
