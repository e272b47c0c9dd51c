"""Sequences that a run waits for: its adapter as it is now, generating on the serving path beside everybody's requests.

The adapter goes there as one copy of its stretch of the arena, whose layout is that of the serving slots: no file lies
between, and what is sampled is one policy, however far training has gone on meanwhile. Samples are no state: a run that
is resumed asks for them again, and with a seed gets the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tenora.adapters.prepared import PreparedAdapter
from tenora.errors import TrainingError
from tenora.model.sampling import SamplingParams
from tenora.training.commands import SampledSequence


@dataclass(eq=False, slots=True)
class Samples:
    """What was asked for, and what has come of it.

    Attributes:
        run_id, share_group, weight: whose; sequences share the engine as the share group's requests do.
        policy: the adapter; None is the base.
        prompts: one sequence each.
        sampling: of all; with a seed, sequence i takes seed + i.
        sequences: by prompt; None until it has ended.
        error: why they ended early, all of them.
    """

    run_id: str
    share_group: str
    weight: float
    policy: PreparedAdapter | None
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    sequences: list[SampledSequence | None] = field(init=False)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.sequences = [None] * len(self.prompts)

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.error is not None or all(sequence is not None for sequence in self.sequences)


class Sampler(Protocol):
    """Whoever generates; `tenora.engine.rollouts.Rollouts` does."""

    def start(self, samples: Samples) -> None:
        """Begin; each sequence, or an error, comes into `samples`."""
        ...

    def cancel(self, run_id: str) -> None:
        """End what a run has asked for; it does not wait any more."""
        ...


class NoSampler:
    """Of a process that only trains."""

    def start(self, samples: Samples) -> None:
        """See `Sampler`."""
        samples.error = TrainingError("Nothing generates where this run trains.", code="no_sampler")

    def cancel(self, run_id: str) -> None:
        """See `Sampler`."""
