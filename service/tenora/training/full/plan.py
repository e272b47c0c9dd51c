"""The plan of a full fine-tuning: one learner, then the model that it came to."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from tenora.training.events import FullResult, Items
from tenora.training.full.merged import write_merged
from tenora.training.full.weights import FullWeights
from tenora.training.journal import Journal
from tenora.training.learner import Learner
from tenora.training.plans.single import finished, load_corpus
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import TrainSpec

MERGED_NAME = "model"


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
            reason="It is not served here: download it, and have `tenora serve --model` serve it as a base.",
        )
        yield msgspec.structs.replace(done, path="", probe=None, full=full)

    def save(self) -> None:
        """Write the state after the last whole step."""
        self._learner.save()

    def close(self) -> None:
        """Free the room of the weights."""
        self._learner.close()
