"""Loss and accuracy on held-out rows, row by row."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tenora.data.dataset import TokenizedDataset
from tenora.model.readouts.base import ReadoutKind
from tenora.model.readouts.tokens import TOKENS
from tenora.training.arena import TrainedAdapter
from tenora.training.events import PROBE_ROWS
from tenora.training.objectives import row_sums
from tenora.training.packing import PackedRows, microbatches
from tenora.training.pass_queue import Work, WorkQueue
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import TrainSpec
from tenora.training.step import TokenLosses

_PACKED_AT_ONCE = 64  # examples; packing is quadratic, and nothing else runs meanwhile


@dataclass(slots=True)
class Evaluation:
    """What was measured on a dataset.

    Attributes:
        loss: nats per learned token; see `tenora.training.methods.method.Learning.judge`.
        accuracy: how often the token was the likeliest.
        rows: per row, the summed loss of its learned tokens.
        tokens: per row, how many these are.
        probe: of the first rows, log-probabilities of the learned tokens, or scores.
        examples, units: of each example the loss, and how much of what `loss` is the mean over it has: here of each row
            its learned tokens.
        metrics: further numbers.
        scores: float32 [rows, k], of rows that a head reads; else None. The probe is then of their first rows.
    """

    loss: float
    accuracy: float
    rows: list[float]
    tokens: list[int]
    probe: list[list[float]]
    examples: list[float]
    units: list[int]
    metrics: dict[str, float] = field(default_factory=dict)
    scores: npt.NDArray[np.float32] | None = None


@dataclass(slots=True)
class _Sums:
    """Grows part by part."""

    rows: list[float]
    tokens: list[int]
    probe: list[list[float]]
    correct: int = 0
    scores: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: TokenizedDataset) -> _Sums:
        rows = len(dataset)
        return cls([0.0] * rows, [0] * rows, [[] for _ in range(min(rows, PROBE_ROWS))])

    def add(self, part: PackedRows, found: TokenLosses) -> None:
        sums = row_sums(part, found.loss).tolist()
        losses = found.loss.cpu().numpy()
        for index, (row, loss) in enumerate(zip(part.rows, sums, strict=True)):
            own = losses[part.target_row == index]
            self.rows[row], self.tokens[row] = loss, len(own)
            if row < len(self.probe):
                self.probe[row] = (-own).tolist()
        if found.scores is not None:
            for row, scores in zip(part.rows, found.scores.cpu().numpy(), strict=True):
                self.scores[row] = scores
                if row < len(self.probe):
                    self.probe[row] = scores.tolist()
        self.correct += int(found.correct.sum())


def measure(
    queue: WorkQueue,
    spec: TrainSpec,
    dataset: TokenizedDataset,
    adapter: TrainedAdapter | None,
    *,
    capacity: int,
    shared: int = 0,
    readout: ReadoutKind = TOKENS,
) -> Generator[None, None, Evaluation]:
    """Measure an adapter, or the base, on every row, waiting while others have their turn.

    Args:
        spec: whose work it is.
        capacity: tokens of a part.
        shared: see `tenora.training.packing.pack`.
        readout: what makes losses of the hidden states.

    Returns:
        The means; the same whatever the capacity, but for the order of additions.
    """
    sums = _Sums.of(dataset)
    examples = dataset.examples
    for first in range(0, examples, _PACKED_AT_ONCE):
        together = range(first, min(first + _PACKED_AT_ONCE, examples))
        parts = microbatches(dataset, together, capacity, shared=shared, invocation=spec.lora.invocation)
        asked = Work(spec.run_id, spec.share_group, parts, adapter, readout=readout, weight=spec.weight)
        work = yield from finish(queue, asked)
        for part, found in zip(parts, work.results, strict=True):
            sums.add(part, found)
    tokens = max(sum(sums.tokens), 1)
    loss, accuracy = sum(sums.rows) / tokens, sums.correct / tokens
    whole = Evaluation(loss, accuracy, sums.rows, sums.tokens, sums.probe, sums.rows, sums.tokens)
    if sums.scores:
        whole.scores = np.stack([sums.scores[row] for row in range(len(dataset))])
    return whole


def general_loss(
    host: TrainingHost, spec: TrainSpec, adapter: TrainedAdapter | None, *, capacity: int
) -> Generator[None, None, float | None]:
    """Mean loss of an adapter, or the base, on the general text, nats per token; None if the run has no such text.

    The base is measured once for all runs.
    """
    text = spec.general_text
    if len(text) < 2:  # the first token is not predicted
        return None
    if adapter is None and text in host.general_losses:
        return host.general_losses[text]
    learned = np.ones(len(text), dtype=np.uint8)
    learned[0] = 0
    row = TokenizedDataset(
        tokens=np.array(text, dtype=np.int32),
        weights=learned,
        offsets=np.array([0, len(text)]),
        lines=np.zeros(1, dtype=np.int64),
    )
    found = yield from measure(host.queue, spec, row, adapter, capacity=capacity)
    if adapter is None:
        host.general_losses[text] = found.loss
    return found.loss


def finish(queue: WorkQueue, work: Work) -> Generator[None, None, Work]:
    """Submit a work and wait for its end.

    Raises:
        Exception: whatever ended it early.
    """
    queue.submit(work)
    while not work.done:
        yield
    if work.error is not None:
        raise work.error
    return work
