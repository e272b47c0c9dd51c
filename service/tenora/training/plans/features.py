"""A head on the frozen base: every row is read once, and what the base makes of it is kept; the rest is arithmetic.

Of each of the last layers there are two candidates, the state of a row's last token and the mean of all. Which of them
the head reads, and how much its weights are held back, is chosen by cross-validation on the training rows; the head is
then fitted on all of them. The held-out rows are read as well and choose nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tenora.adapters.head_files import HeadTensors
from tenora.adapters.kinds.head import head_config
from tenora.adapters.peft_format import write_files
from tenora.data.dataset import TokenizedDataset
from tenora.errors import TrainingError
from tenora.model.readouts.features import Features
from tenora.training.checkpoint import checkpoint_path
from tenora.training.closed_form import Linear
from tenora.training.evaluation import finish
from tenora.training.events import (
    EvalEvent,
    EvaluationPoint,
    FinishedEvent,
    HeadOutcome,
    HeldOut,
    Items,
    ProgressEvent,
)
from tenora.training.head_fit import Chosen, HeadFit, Key, head_of
from tenora.training.journal import Journal
from tenora.training.methods.table import find_method
from tenora.training.packing import microbatches
from tenora.training.pass_queue import Work
from tenora.training.plans.single import load_corpus
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import TrainSpec

Float32Array = npt.NDArray[np.float32]
Event = EvalEvent | FinishedEvent

LAST_LAYERS = 4
KEPT_BYTES = 512 * 2**20
"""Of features: of more rows fewer candidates are kept, and where not even one fits, the run is refused."""
_AT_ONCE = 64  # rows: packing is quadratic, and nothing else runs meanwhile


class FeaturesPlan:
    """Read, compare, fit."""

    def __init__(self, host: TrainingHost, spec: TrainSpec, journal: Journal) -> None:  # noqa: ARG002 - as every plan
        """Read the files; raises as `Corpus.load`, and TrainingError if the features cannot be kept."""
        self._host, self._spec = host, spec
        self._settings = find_method(spec.method).own_settings(spec.method_settings)
        self._corpus = load_corpus(spec)
        self._started = time.monotonic()
        rows = len(self._corpus.train) + len(self._corpus.valid)
        self._wanted = self._candidates(rows)

    @property
    def step(self) -> int:
        """There are none."""
        return 0

    def items(self) -> Items:
        """Events, and None where it waits, up to the FinishedEvent."""
        corpus = self._corpus
        train = yield from self._read(corpus.train, 0)
        valid = yield from self._read(corpus.valid, len(corpus.train))
        fit = HeadFit(corpus.train, self._settings, seed=self._spec.split_seed)
        chosen = yield from fit.choose(train)
        yield from self._told(fit, chosen, valid[chosen.key])

    def save(self) -> None:
        """Nothing is kept: whoever resumes the run reads the rows again."""

    def close(self) -> None:
        """Nothing is held."""

    def _candidates(self, rows: int) -> tuple[Key, ...]:
        """What may be read of each row, the usual first, as much as can be kept."""
        layers, pooling = self._settings["head_layer"], self._settings["head_pooling"]
        deepest = min(LAST_LAYERS, len(self._host.decoder.layers))
        every = range(-1, -deepest - 1, -1) if layers is None else (layers,)
        wanted = [(layer, kind) for layer in every for kind in (("last", "mean") if pooling is None else (pooling,))]
        each = rows * self._host.decoder.spec.hidden_size * 4
        if each > KEPT_BYTES:
            raise TrainingError(
                f"What the base makes of {rows} rows takes {each:,} bytes and {KEPT_BYTES:,} are kept; give fewer "
                "rows, or train layers (train_layers), which learns row by row.",
                code="too_many_rows",
            )
        return tuple(wanted[: max(1, KEPT_BYTES // each)])

    def _read(
        self, rows: TokenizedDataset, before: int
    ) -> Generator[ProgressEvent | None, None, Mapping[Key, Float32Array]]:
        """Features of all rows, by what was read: float32 [rows, H]."""
        spec, host = self._spec, self._host
        capacity = host.part_tokens(spec.tokens_per_microbatch, recompute=spec.recompute_activations)
        width = host.decoder.spec.hidden_size
        found = np.zeros((len(self._wanted), len(rows), width), np.float32)
        total = len(self._corpus.train) + len(self._corpus.valid)
        for first in range(0, len(rows), _AT_ONCE):
            together = range(first, min(first + _AT_ONCE, len(rows)))
            parts = microbatches(rows, together, capacity)
            asked = Work(spec.run_id, spec.share_group, parts, None, readout=Features(self._wanted), weight=spec.weight)
            work = yield from finish(host.queue, asked)
            for part, read in zip(parts, work.results, strict=True):
                if read.scores is None:
                    raise RuntimeError("a pass gave no features.")
                places = np.array(part.rows)[part.target_row]
                states = read.scores.cpu().numpy().reshape(len(places), len(self._wanted), width)
                found[:, places] = states.transpose(1, 0, 2)
            yield ProgressEvent(run_id=spec.run_id, what="Rows read", done=before + together.stop, total=total)
        return dict(zip(self._wanted, found, strict=True))

    def _told(self, fit: HeadFit, chosen: Chosen, states: Float32Array) -> Iterator[Event]:
        """Write the adapter, and say how it does on the held-out rows beside what says the same of every row."""
        spec, valid = self._spec, self._corpus.valid
        if valid.labels is None:
            raise TrainingError("The held-out rows have no labels.", code="invalid_training_file")
        scores = chosen.linear(states)
        measured = [
            (fit.losses(said, valid.labels), fit.right(said, valid.labels))
            for said in (np.tile(fit.constant(), (len(valid), 1)), scores)
        ]
        start, losses = (loss for loss, _ in measured)
        points = [
            EvaluationPoint(step=step, valid_loss=float(loss.mean()), valid_accuracy=float(hit.mean()))
            for step, (loss, hit) in enumerate(measured)
        ]
        for point in points:
            yield EvalEvent(
                run_id=spec.run_id,
                step=point.step,
                valid_loss=point.valid_loss,
                valid_accuracy=point.valid_accuracy,
                base_loss=points[0].valid_loss,
                best=point.step == 1,
                tasks=self._tasks(start if point.step == 0 else losses),
            )
        path = write_head(spec, self._heads(chosen))
        last = points[-1]
        yield FinishedEvent(
            run_id=spec.run_id,
            path=str(path),
            step=1,
            steps=1,
            valid_loss=last.valid_loss,
            valid_accuracy=last.valid_accuracy,
            base_loss=points[0].valid_loss,
            trained_tokens=self._corpus.train.num_tokens - len(self._corpus.train),
            seconds=time.monotonic() - self._started,
            last_loss=last.valid_loss,
            held_out=HeldOut(tokens=[1] * len(valid), adapter=losses.tolist(), start=start.tolist()),
            tasks=self._tasks(losses),
            curve=points,
            head=HeadOutcome(
                scores=(scores * chosen.std + chosen.mean).tolist(), folds=chosen.folds, candidates=[*chosen.candidates]
            ),
        )

    def _heads(self, chosen: Chosen) -> HeadTensors:
        """The head as it is stored. A scalar's scores are in its labels' units, and served as they are."""
        labels, linear = self._corpus.train.labels, chosen.linear
        if labels is None:
            raise TrainingError("The rows have no labels.", code="invalid_training_file")
        head = head_of(chosen, labels, self._settings)
        if head.kind == "scalar":
            linear = Linear(linear.weight * chosen.std, linear.bias * chosen.std + chosen.mean)
        weight, bias = linear.weight.astype(np.float32), linear.bias.astype(np.float32)[:, None]
        return HeadTensors((head,), weight, bias)

    def _tasks(self, losses: npt.NDArray[np.float64]) -> dict[str, float]:
        """The mean loss of each task, if there are several."""
        names, task = self._corpus.names, self._corpus.valid_task
        if len(names) == 1:
            return {}
        return {name: float(losses[task == number].mean()) for number, name in enumerate(names)}


def write_head(spec: TrainSpec, heads: HeadTensors) -> Path:
    """Write the adapter of a run that has a head and nothing else, replacing what an earlier attempt may have left."""
    directory = checkpoint_path(Path(spec.workdir), 1)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    write_files(directory, head_config(spec.base_model), {}, heads=heads)
    return directory
