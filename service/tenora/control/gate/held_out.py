"""The held-out examples of a run, and the losses of anything that can be served on them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tenora.adapters.ref import AdapterRef
from tenora.control.gate.card import Comparison, compare
from tenora.control.inference.scoring import Scorer
from tenora.data.dataset import TokenizedDataset, concatenate
from tenora.training.events import HeldOut
from tenora.training.methods.method import Float64Array, Method
from tenora.training.methods.table import find_method
from tenora.training.spec import TrainSpec

MOST_EXAMPLES = 128
"""That are scored for a comparison: its interval narrows with the root of them, and a finished adapter waits."""
MOST_TOKENS = 32_768  # that are scored for it, for the same reason
_AT_ONCE = 8  # requests: requests of tenants come in between


@dataclass(frozen=True, slots=True)
class HeldOutExamples:
    """What a run was measured on.

    A row's loss is the negative log-probability of its learned tokens, summed. That of an example is the method's
    (`Method.example_losses`), with what the run started from as the reference.

    Attributes:
        dataset: the rows.
        found: losses of each row under the result and under what training started from.
        method, settings: that it was made by, and the method's own settings.
        seed: of bootstraps, and of drawing examples where there are too many to score.
        of_tasks: how many examples are of each task, which lie one after the other.
    """

    dataset: TokenizedDataset
    found: HeldOut
    method: Method
    settings: Mapping[str, Any]
    seed: int
    of_tasks: tuple[int, ...]

    @classmethod
    def load(cls, spec: TrainSpec, found: HeldOut) -> HeldOutExamples:
        """Read what `found` was measured on; DatasetError if it is missing or broken."""
        parts = _held_out(spec)
        of_tasks = tuple(part.examples for part in parts)
        method = find_method(spec.method)
        settings = method.own_settings(spec.method_settings)
        return cls(concatenate(parts), found, method, settings, spec.seed, of_tasks)

    @property
    def result(self) -> Float64Array:
        """Losses of the rows under the result, [examples, rows of an example]."""
        return self._by_example(self.found.adapter)

    @property
    def start(self) -> Float64Array:
        """The same under what training started from."""
        return self._by_example(self.found.start)

    def compare(self, others: Mapping[int, Sequence[float]]) -> Comparison | None:
        """The result beside something else.

        Args:
            others: of the examples that were measured, the losses of their rows under it.

        Returns:
            None if these examples have no learned token.
        """
        examples = np.array(sorted(others), dtype=np.int64)
        other = np.array([others[example] for example in examples.tolist()], dtype=np.float64)
        tokens = self._by_example(self.found.tokens)[examples].sum(axis=1).astype(np.int64)
        if not len(examples) or not tokens.sum():
            return None
        return compare(
            tokens.tolist(),
            self._losses(examples, self.result[examples]).tolist(),
            self._losses(examples, other).tolist(),
            seed=self.seed,
            unit=self.method.unit,
        )

    def against_start(self, task: int | None = None) -> Comparison | None:
        """The result beside what training started from, on all examples, or on those of one task."""
        start = dict(enumerate(self.start.tolist()))
        if task is not None:
            first = sum(self.of_tasks[:task])
            start = {example: start[example] for example in range(first, first + self.of_tasks[task])}
        return self.compare(start)

    def choose(self, examples: Sequence[int], *, max_length: int) -> list[int]:
        """Of these examples as many as are worth scoring, drawn by the seed, without those that the engine has no
        room for.
        """
        size, chosen, tokens = self.dataset.rows_per_example, list[int](), 0
        for example in np.random.default_rng(self.seed).permutation(np.array(examples, dtype=np.int64)).tolist():
            lengths = [len(self.dataset.row(size * example + part)[0]) for part in range(size)]
            if max(lengths) > max_length or (chosen and tokens + sum(lengths) > MOST_TOKENS):
                continue
            chosen.append(example)
            tokens += sum(lengths)
            if len(chosen) == MOST_EXAMPLES:
                break
        return sorted(chosen)

    async def score(
        self, scorer: Scorer, examples: Sequence[int], adapter: AdapterRef | None
    ) -> dict[int, list[float]]:
        """Losses of the rows of these examples under an adapter, or the base, as it is served; raises as `score`."""
        size = self.dataset.rows_per_example
        rows = [size * example + part for example in examples for part in range(size)]
        losses: list[float] = []
        for first in range(0, len(rows), _AT_ONCE):
            losses += await asyncio.gather(
                *(self._score_row(scorer, row, adapter) for row in rows[first : first + _AT_ONCE])
            )
        return {example: losses[size * index : size * (index + 1)] for index, example in enumerate(examples)}

    async def _score_row(self, scorer: Scorer, row: int, adapter: AdapterRef | None) -> float:
        tokens, weights = self.dataset.row(row)
        learned = [place for place in np.flatnonzero(weights).tolist() if place > 0]
        return -sum(await scorer.score(tokens.tolist(), learned, adapter)) if learned else 0.0

    def _losses(self, examples: npt.NDArray[np.int64], rows: Float64Array) -> Float64Array:
        """One number for each example, from the losses of its rows."""
        return self.method.example_losses(self.settings, rows, self.start[examples])

    def _by_example(self, values: Sequence[float]) -> Float64Array:
        return np.array(values, dtype=np.float64).reshape(-1, self.dataset.rows_per_example)


def held_out_rows(spec: TrainSpec) -> TokenizedDataset:
    """What a run is measured on, in the order of its `HeldOut`: rows of all tasks, with folds those it trains on.

    Raises:
        DatasetError: a file is missing or broken.
    """
    return concatenate(_held_out(spec))


def _held_out(spec: TrainSpec) -> list[TokenizedDataset]:
    """Of each task."""
    return [TokenizedDataset.load(Path(task.valid_path or task.train_path)) for task in spec.tasks]
