"""What all runs share: the base, the arena of their adapters, what they wait for, and what a pass may hold."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.model.executors.choice import kept_bytes_per_token
from tenora.model.executors.layers import Keep
from tenora.model.sampling import SamplingParams
from tenora.training.arena import TrainedAdapter, TrainingArena
from tenora.training.commands import SampledSequence
from tenora.training.pass_queue import WorkQueue
from tenora.training.samples import NoSampler, Sampler, Samples
from tenora.training.spec import SessionSpec, TrainSpec

# Of a pass whose activations are kept. On a CPU larger ones are hardly faster, they only hold the pass longer between
# two boundaries.
_ACTIVATION_BYTES = {"cpu": 768 * 2**20, "cuda": 8 * 2**30}
_KEPT_SHARE = 0.75  # of the memory that training was given: the rest is for adapters, gradients and moments
_USUAL_RANK = 16


@dataclass(slots=True)
class TrainingHost:
    """The resident base as runs see it.

    Attributes:
        tokens_per_pass: most tokens of a fused pass; a single longer row makes one of its own.
        sampler: generates with adapters in training.
        memory: bytes that training was given of the device; 0 if nobody has counted.
        kept_tokens: tokens of the largest pass whose activations are kept; longer ones run their layers twice.
        most_tokens: tokens of the largest pass that memory is meant for if its layers run twice.
        general_losses: of the base on the texts that runs have measured it on.
    """

    decoder: Decoder
    arena: TrainingArena
    queue: WorkQueue
    tokens_per_pass: int = 2048
    memory: int = 0
    sampler: Sampler = field(default_factory=NoSampler)
    kept_tokens: int = field(init=False)
    most_tokens: int = field(init=False)
    general_losses: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_token = kept_bytes_per_token(self.decoder, _USUAL_RANK, Keep.ALL)
        budget = int(self.memory * _KEPT_SHARE) or _ACTIVATION_BYTES.get(
            self.decoder.device.type, _ACTIVATION_BYTES["cpu"]
        )
        self.kept_tokens = max(1, budget // per_token)
        self.most_tokens = max(1, budget // kept_bytes_per_token(self.decoder, _USUAL_RANK, Keep.INPUTS))

    @property
    def shares_prefixes(self) -> bool:
        """Whether what all rows begin with may be computed once: not if positions are rotated by a row's length."""
        return not self.decoder.rotary.depends_on_length

    @property
    def capacity(self) -> int:
        """Tokens of a fused pass."""
        return min(self.tokens_per_pass, self.kept_tokens)

    def part_tokens(self, wanted: int, *, recompute: bool | None) -> int:
        """Tokens of a run's own parts: what it asked for, but no more than memory keeps, unless layers run twice."""
        return wanted if recompute else min(wanted, self.kept_tokens)

    def require_room(self, step: int, tokens: int) -> None:
        """Raise TrainingError unless the rows of a step, which cannot be divided, fit one pass."""
        if tokens > self.most_tokens:
            raise TrainingError(
                f"The rows of step {step} are compared with each other and have {tokens} tokens together; there is "
                f"room for {self.most_tokens}. Use a smaller batch_size, or shorter rows (max_seq_length with "
                "truncate).",
                code="batch_too_large",
            )

    def sample(
        self,
        run: TrainSpec | SessionSpec,
        adapter: TrainedAdapter | None,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
    ) -> Generator[None, None, list[SampledSequence]]:
        """Continue prompts with an adapter as it is now, or the base, waiting while others have their turn.

        Args:
            run: whose samples they are.
            adapter: may be trained further meanwhile: what generates is a copy.
            prompts: token ids; one sequence each.
            sampling: of all; with a seed, sequence i takes seed + i.

        Raises:
            TrainingError: one of them failed, with the code of `SequenceFailed`.
        """
        policy = None if adapter is None else adapter.prepared()
        samples = Samples(run.run_id, run.share_group, run.weight, policy, prompts, sampling)
        self.sampler.start(samples)
        self.queue.watch(samples)
        while not samples.done:
            yield
        if samples.error is not None:
            raise samples.error
        return [sequence for sequence in samples.sequences if sequence is not None]
