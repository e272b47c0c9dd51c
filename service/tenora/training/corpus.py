"""The rows of a run: those of all its tasks as one dataset, in the order in which they are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tenora.data.dataset import TokenizedDataset, concatenate
from tenora.data.division import fold
from tenora.data.rows import RowKind
from tenora.errors import TrainingError
from tenora.training.packing import Int64Array
from tenora.training.spec import TaskSpec

_KEPT_ORDERS = 4  # those last asked for: trials of a sweep are not all in the same epoch


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and rows to measure on. An example is a row, or a pair of them for DPO.

    Attributes:
        train: of all tasks, one after the other.
        valid: likewise; has no rows if the run measures on folds of `train`.
        names: of the tasks.
        weights: how often each task is seen, the largest 1.
        train_task, valid_task: int64, the task of each example.
    """

    train: TokenizedDataset
    valid: TokenizedDataset
    names: tuple[str, ...]
    weights: tuple[float, ...]
    train_task: Int64Array
    valid_task: Int64Array
    _orders: dict[tuple[int, int], Int64Array] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def load(cls, tasks: Sequence[TaskSpec], *, kind: RowKind) -> Corpus:
        """Read the datasets of a run.

        Raises:
            DatasetError: one is missing or broken.
            TrainingError: one holds nothing to learn, or rows for another method.
        """
        if not tasks:
            raise TrainingError("The run names no rows to train on.", code="invalid_training_file")
        train = [_load(task.train_path, "training", kind) for task in tasks]
        valid = [_load(task.valid_path, "validation", kind) for task in tasks if task.valid_path]
        largest = max(task.weight for task in tasks)
        return cls(
            train=concatenate(train),
            valid=concatenate(valid) if valid else train[0].select(np.zeros(0, np.int64)),
            names=tuple(task.name for task in tasks),
            weights=tuple(task.weight / largest for task in tasks),
            train_task=_tasks(train),
            valid_task=_tasks(valid),
        )

    @property
    def examples(self) -> int:
        """Examples of an epoch."""
        return sum(self._drawn())

    def steps_per_epoch(self, batch_size: int) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.examples // batch_size)

    def batch(self, step: int, batch_size: int, *, seed: int) -> list[int]:
        """The examples of an optimizer step, which depend on the step and the seed alone: a resumed run needs no more.

        The steps of an epoch are as even as possible: 17 rows in batches of 8 make 6 + 6 + 5, not 8 + 8 + 1, whose last
        step would be one row's noise at full strength.
        """
        per_epoch = self.steps_per_epoch(batch_size)
        epoch, index = divmod(step, per_epoch)
        order = self._order(seed, epoch)
        least, longer = divmod(len(order), per_epoch)
        start = index * least + min(index, longer)
        examples: list[int] = order[start : start + least + (index < longer)].tolist()
        return examples

    def fold(self, number: int, folds: int, *, seed: int) -> tuple[Corpus, Int64Array]:
        """The corpus of cross-validation fold `number` of `folds`, and the examples that it holds out."""
        held_out = fold(self.train, folds, seed=seed)[number]
        kept = np.setdiff1d(np.arange(self.train.examples), held_out)
        part = replace(
            self,
            train=self.train.select(kept),
            valid=self.train.select(held_out),
            train_task=self.train_task[kept],
            valid_task=self.train_task[held_out],
            _orders={},
        )
        return part, held_out

    def where(self, rows: Sequence[int]) -> str:
        """The lines of rows of `train`, for a message: `line 7`, `lines 1, 2 and 5 more`."""
        size = self.train.rows_per_example
        found = sorted({(int(self.train_task[row // size]), int(self.train.lines[row])) for row in rows})
        named = [f"{line} of {self.names[task]}" if len(self.names) > 1 else str(line) for task, line in found]
        shown = ", ".join(named[:16]) + (f" and {len(named) - 16} more" if len(named) > 16 else "")
        return f"line{'s' if len(named) > 1 else ''} {shown}"

    def _drawn(self) -> list[int]:
        """Examples of each task in an epoch."""
        counts = np.bincount(self.train_task, minlength=len(self.names))
        return [max(1, round(weight * int(count))) for weight, count in zip(self.weights, counts, strict=True)]

    def _order(self, seed: int, epoch: int) -> Int64Array:
        """Of the examples of an epoch. It is drawn once for many steps, also of several trials, whose steps differ."""
        order = self._orders.pop((seed, epoch), None)
        if order is None:
            order = self._epoch(seed, epoch)
        self._orders[seed, epoch] = order
        if len(self._orders) > _KEPT_ORDERS:
            del self._orders[next(iter(self._orders))]
        return order

    def _epoch(self, seed: int, epoch: int) -> Int64Array:
        random = np.random.default_rng([seed, epoch])
        if all(weight == 1.0 for weight in self.weights):
            return random.permutation(len(self.train_task))
        drawn = [
            random.permutation(np.flatnonzero(self.train_task == task))[:count]
            for task, count in enumerate(self._drawn())
        ]
        return random.permutation(np.concatenate(drawn))


def _tasks(datasets: Sequence[TokenizedDataset]) -> Int64Array:
    counts = [dataset.examples for dataset in datasets]
    return np.repeat(np.arange(len(datasets), dtype=np.int64), counts)


def _load(path: str, what: str, kind: RowKind) -> TokenizedDataset:
    dataset = TokenizedDataset.load(Path(path))
    if dataset.kind != kind:
        raise TrainingError(
            f"The {what} file must hold {kind.name} for this method, not {dataset.kind.name}.",
            code="invalid_training_file",
        )
    if dataset.num_trained == 0:
        raise TrainingError(
            f"The {what} rows hold no token to learn from: {len(dataset)} rows, {dataset.num_tokens} tokens, none of "
            "them in an assistant message or completion that counts; add such rows.",
            code="no_trainable_tokens",
        )
    return dataset
