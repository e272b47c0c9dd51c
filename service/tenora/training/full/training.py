"""One full fine-tuning from its request to its last event: what the process does between looking at its commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tenora.model.decoder import Decoder
from tenora.model.device import survive
from tenora.training.events import TrainEvent
from tenora.training.full.passing import learn, measure
from tenora.training.full.plan import FullPlan
from tenora.training.full.selection import TOKENS_PER_PASS, Selection
from tenora.training.full.weights import FullArena, FullWeights
from tenora.training.pass_queue import Work, WorkQueue
from tenora.training.resident_base import TrainingHost
from tenora.training.run import JobRun
from tenora.training.spec import TrainSpec
from tenora.training.step import TokenLosses


class FullHost(TrainingHost):
    """A copy of the base that one run has to itself.

    Attributes:
        weights: that are trained.
    """

    def __init__(self, decoder: Decoder, selection: Selection) -> None:
        self.weights = FullWeights(decoder, selection)
        super().__init__(decoder, FullArena(self.weights), WorkQueue(), TOKENS_PER_PASS)

    def part_tokens(self, wanted: int, *, recompute: bool | None) -> int:  # noqa: ARG002  # it always does
        """See `TrainingHost`: what admission has counted on."""
        return min(wanted, TOKENS_PER_PASS)


class FullTraining:
    """Iterate it as a `JobRun`: events, and None where commands may be looked at.

    Attributes:
        run: to be stopped, paused and acknowledged.
    """

    def __init__(self, host: FullHost, spec: TrainSpec, base: Path) -> None:
        """Nothing happens before it is iterated. `base`: the directory of the base."""
        self._host = host
        self._run_id = spec.run_id
        self.run = JobRun(host, spec, lambda journal: FullPlan(host, spec, journal, host.weights, base))

    def __iter__(self) -> Iterator[TrainEvent | None]:
        """Let the run go as far as it can; where it waits, run the next part of its rows."""
        for item in self.run:
            yield item
            if item is None:
                self._advance()

    def _advance(self) -> None:
        queue = self._host.queue
        queue.collect(self._run_id)
        for work in queue.choose(1):
            if not work.results:
                work.begin()
            try:
                queue.finished(work, self._pass(work))
            except Exception as error:  # noqa: BLE001  # the run tells it
                survive(error, self._host.decoder.device)
                work.error = error

    def _pass(self, work: Work) -> TokenLosses:
        rows = work.parts[len(work.results)]
        if work.objective is None:
            return measure(self._host.decoder, rows)
        return learn(self._host.weights, rows, work.objective)
