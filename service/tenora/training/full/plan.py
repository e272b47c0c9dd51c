"""The plan of a full fine-tuning: one learner, then the model that it came to."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import msgspec

from tenora.model.checkpoint import Checkpoint
from tenora.training.checkpoint import checkpoint_path
from tenora.training.evaluation import Evaluation, general_loss
from tenora.training.events import FinishedEvent, FullResult, HeldOut, Items, Probe, RankPoint
from tenora.training.full.merged import write_merged
from tenora.training.full.serving import (
    KL_NATS,
    Approximation,
    allowed_gap,
    measured_rows,
    told_left_out,
)
from tenora.training.full.weights import FullWeights
from tenora.training.journal import Journal
from tenora.training.learner import Learner
from tenora.training.plans.single import finished, load_corpus
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import TrainSpec

MERGED_NAME, ADAPTER_NAME = "model", "adapter"
SERVED = "adapter"
"""What serve_as is unless there is to be a download alone."""


class FullPlan:
    """One learner, whose best weights become a model."""

    def __init__(self, host: TrainingHost, spec: TrainSpec, journal: Journal, weights: FullWeights, base: Path) -> None:
        """Read the rows and take up the state; raises as `Corpus.load` and `Learner` do.

        Args:
            weights: that the host's learner trains.
            base: the directory of the base.
        """
        self._weights, self._base, self._spec = weights, base, spec
        self._learner = Learner(host, spec, load_corpus(spec), journal)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._learner.progress.step

    def items(self) -> Items:
        """Events, and None where it waits, up to the FinishedEvent."""
        learner = self._learner
        yield from learner.fit()
        done = finished(learner)
        learner.optimizer.let_go()
        self._weights.let_go_of_gradients()
        yield None
        self._weights.read(Path(done.path))
        directory = Path(self._spec.workdir, MERGED_NAME)
        shutil.rmtree(directory, ignore_errors=True)
        digest = write_merged(directory, self._base, self._weights.tensors)
        yield None
        full = FullResult(
            path=str(directory),
            digest=digest,
            trained=self._weights.numel,
            valid_loss=done.valid_loss,
            reason="serve_as is none. `tenora serve --model` serves the download as a base.",
        )
        done = msgspec.structs.replace(done, path="", probe=None, full=full)
        if self._spec.method_settings["serve_as"] == SERVED:
            with Checkpoint.open(self._base) as base:
                done = yield from self._served(done, base)
        yield done

    def _served(self, done: FinishedEvent, base: Checkpoint) -> Generator[None, None, FinishedEvent]:
        """The event with an adapter in the model's place, if one is close enough."""
        learner, spec = self._learner, self._spec
        if done.full is None or done.held_out is None:
            return done
        rows = measured_rows(learner.corpus.valid, capacity=learner.capacity, seed=spec.seed)
        allowed = allowed_gap(done.held_out.tokens, done.held_out.adapter, done.held_out.start, seed=spec.seed)
        near = Approximation(self._weights, base, rows, most_rank=spec.lora.rank)
        yield from near.prepare()
        curve: list[RankPoint] = []
        for rank in near.ranks:
            near.take(rank)
            curve.append((yield from near.measure(rank)))
            if curve[-1].gap <= allowed and curve[-1].kl <= KL_NATS:
                break
        passed = curve[-1].gap <= allowed and curve[-1].kl <= KL_NATS
        full = msgspec.structs.replace(
            done.full,
            curve=curve,
            allowed_gap=allowed,
            allowed_kl=KL_NATS,
            rank=curve[-1].rank if passed else 0,
            reason=told(curve[-1], allowed, passed=passed) + told_left_out(near.left_out),
        )
        if not passed:
            return msgspec.structs.replace(done, full=full)
        path = checkpoint_path(Path(spec.workdir), done.step).with_name(ADAPTER_NAME)
        shutil.rmtree(path, ignore_errors=True)
        near.write(path, curve[-1].rank, base_model=spec.base_model)
        found = yield from learner.measure()
        general = yield from general_loss(learner.host, spec, learner.adapter, capacity=learner.capacity)
        served = probed(learner, done, found)
        return msgspec.structs.replace(served, path=str(path), general_loss=general, full=full)

    def save(self) -> None:
        """Write the state after the last whole step."""
        self._learner.save()

    def close(self) -> None:
        """Free the room of the weights."""
        self._learner.close()


def told(last: RankPoint, allowed: float, *, passed: bool) -> str:
    """What came of the ranks, the last of which is `last`."""
    found = (
        f"held-out loss {last.gap:+.4f} beside the model's (at most {allowed:+.4f}), KL(model ‖ adapter) {last.kl:.4f} "
        f"(at most {KL_NATS:g}), nats per token"
    )
    if passed:
        return f"An adapter of a mean rank of {last.rank} is served in the model's place: {found}."
    return (
        f"The model is not served here: no adapter of a mean rank up to {last.rank} is close enough; at that rank "
        f"{found}. `tenora serve --model` serves the download as a base."
    )


def probed(learner: Learner, done: FinishedEvent, found: Evaluation) -> FinishedEvent:
    """The event with the figures of what is served."""
    rows = int((learner.corpus.valid_task == 0).sum()) * learner.corpus.valid.rows_per_example
    start = [] if done.held_out is None else done.held_out.start
    return msgspec.structs.replace(
        done,
        valid_loss=found.loss,
        valid_accuracy=found.accuracy,
        held_out=HeldOut(tokens=found.tokens, adapter=found.rows, start=start),
        probe=Probe(path=learner.spec.tasks[0].valid_path, rows=found.probe[:rows]),
    )
