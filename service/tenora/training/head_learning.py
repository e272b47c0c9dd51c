"""A head that is learned by gradient, with the low-rank terms below it: what a step minimises, and how good it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.adapters.head_files import HeadTensors
from tenora.adapters.heads import Head
from tenora.adapters.safetensors_file import as_float32
from tenora.adapters.table_rows import RowKind
from tenora.adapters.weights import AdapterWeights
from tenora.data.dataset import TokenizedDataset
from tenora.data.labels import Labels
from tenora.errors import TrainingError
from tenora.model.readouts.base import ReadoutKind
from tenora.model.readouts.heads import Heads
from tenora.model.readouts.losses import ClassLoss, ContrastiveLoss, HeadLoss, LabelsLoss, SquaredError
from tenora.training.corpus import Corpus
from tenora.training.evaluation import Evaluation
from tenora.training.events import PROBE_ROWS, HeadOutcome
from tenora.training.head_metrics import class_metrics, labels_metrics, number_metrics, recalls
from tenora.training.methods.answers import MeanLoss
from tenora.training.methods.method import Figures, Learner, Learning
from tenora.training.packing import PackedRows, row_labels
from tenora.training.step import TokenLosses

Float32Array = npt.NDArray[np.float32]
_SAME = ("kind", "size", "labels", "multi_label", "pooling", "layer")
"""What two heads have in common if one can go on where the other is."""
_LOSSES: dict[str, HeadLoss] = {"class": ClassLoss(), "classes": LabelsLoss(), "number": SquaredError()}


class HeadLearning(Learning):
    """One head of an adapter. A head of labels begins at zero; an embedding of n numbers is the first n, at the start.

    Numbers are told in units of the training labels' standard deviation, from their mean.
    """

    def __init__(self, learner: Learner, settings: Mapping[str, Any], size: int) -> None:
        """A head of so many rows, as the method's own settings want it. TrainingError if the rows have no labels."""
        super().__init__(learner)
        rows = learner.corpus.train
        self._mean, self._std, self._corpus = 0.0, 1.0, learner.corpus
        if rows.labels is not None and rows.labels.kind == "number":
            self._mean, self._std = float(rows.labels.values.mean()), float(rows.labels.values.std()) or 1.0
            self._corpus = _told_in(learner.corpus, self._mean, self._std)
        self.head = self._described(settings, size)
        self._loss: HeadLoss = ContrastiveLoss() if self._is_embedding else _LOSSES[_labels(rows).kind]
        row = learner.adapter.head_row if self.head.size else None
        self._readout = Heads(row, self._loss, mean=self.head.pooling == "mean")

    @property
    def corpus(self) -> Corpus:
        """See `Learning`."""
        return self._corpus

    @property
    def readout(self) -> ReadoutKind:
        """See `Learning`."""
        return self._readout

    @property
    def begins_as_base(self) -> bool:
        """See `Learning`: the base has no head."""
        return not self.head.size

    @property
    def reads_whole_rows(self) -> bool:
        """See `Learning`."""
        return self.head.pooling == "mean"

    @property
    def needs_whole_steps(self) -> bool:
        """See `Learning`: an anchor is compared with every candidate of its step."""
        return self._is_embedding

    def begin(self) -> None:
        """See `Learning`.

        Raises:
            TrainingError: the starting adapter has another head, which would be lost.
        """
        if self.head.size:
            self._begin(self.learner.adapter.head, self.learner.parent)
            self.learner.adapter.refresh()

    def heads(self) -> HeadTensors:
        """See `Learning`. A scalar is stored in its labels' own units, and is served as it is."""
        if not self.head.size:
            return HeadTensors((self.head,), None)
        weight = self.learner.adapter.head.cpu().numpy().copy()
        if self.head.kind != "scalar":
            return HeadTensors((self.head,), weight)
        bias = np.full((len(weight), 1), self._mean, np.float32)
        return HeadTensors((self.head,), (weight * self._std).astype(np.float32), bias)

    def objective(self, parts: Sequence[PackedRows]) -> MeanLoss:
        """See `Learning`: the mean over examples; of a pair only its anchor has a loss."""
        return MeanLoss(self._examples(parts))

    def measure(self, step: int, parts: Sequence[PackedRows], found: Sequence[TokenLosses]) -> Figures:
        """See `Learning`."""
        del step
        count = self._examples(parts)
        loss = sum(float(part.loss.double().sum()) for part in found) / count
        return Figures(loss, sum(int(part.correct.sum()) for part in found) / count)

    def judge(self, found: Evaluation, start: Sequence[float] | None) -> Evaluation:
        """See `Learning`. A head starts from what says the same of every row: the shares of the training rows' labels,
        the mean of their numbers. An embedding starts as the base's.
        """
        valid = self._corpus.valid
        if found.scores is None:
            raise RuntimeError("the evaluation of a head came without its scores.")
        if self._is_embedding:
            return self._judge_pairs(found, found.scores, valid)
        begins = start is None and not self.learner.spec.init_path
        scores = np.tile(self._constant(), (len(valid), 1)) if begins else found.scores
        measured = self._loss(torch.from_numpy(scores), torch.from_numpy(row_labels(valid, range(len(valid)))))
        losses: list[float] = measured.loss.double().tolist()
        return dataclasses.replace(
            found,
            loss=float(np.mean(losses)),
            accuracy=float(measured.correct.double().mean()),
            rows=losses,
            examples=losses,
            units=[1] * len(valid),
            metrics=self._metrics(scores, _labels(valid)),
            scores=scores,
        )

    def outcome(self, found: Evaluation) -> HeadOutcome | None:
        """See `Learning`."""
        if found.scores is None:
            return None
        if self._is_embedding:
            return HeadOutcome(scores=found.scores[:PROBE_ROWS].tolist(), metrics=found.metrics)
        return HeadOutcome(scores=(found.scores.astype(np.float64) * self._std + self._mean).tolist())

    def _judge_pairs(self, found: Evaluation, scores: Float32Array, valid: TokenizedDataset) -> Evaluation:
        """The loss is that of batches of the training's size: it depends on how many candidates there are."""
        size, batch = valid.rows_per_example, self.learner.spec.batch_size * valid.rows_per_example
        targets = row_labels(valid, range(len(valid)))
        losses: list[float] = []
        right = 0
        for first in range(0, len(valid), batch):
            span = slice(first, first + batch)
            measured = self._loss(torch.from_numpy(scores[span]), torch.from_numpy(targets[span]))
            losses += measured.loss.double().tolist()
            right += int(measured.correct.sum())
        role = targets[:, 1]
        candidates = np.flatnonzero(role > 0)
        own = np.searchsorted(candidates, np.flatnonzero(role == 1))
        anchors = losses[::size]
        return dataclasses.replace(
            found,
            loss=float(np.mean(anchors)),
            accuracy=right / valid.examples,
            rows=losses,
            examples=anchors,
            units=[1] * valid.examples,
            metrics=recalls(scores[role == 0], scores[candidates], own),
        )

    def _described(self, settings: Mapping[str, Any], rows: int) -> Head:
        labels = self.learner.corpus.train.labels
        kind = settings["head_type"]
        usual = "mean" if kind == "embedding" else "last"
        return Head(
            name=settings["head_name"] or kind,
            kind=kind,
            start=0,
            stop=rows,
            labels=() if labels is None else labels.names,
            multi_label=labels is not None and labels.kind == "classes",
            pooling="mean" if (settings["head_pooling"] or usual) == "mean" else "last",
            bias=kind == "scalar",
            mean=self._mean if kind == "regression" else 0.0,
            std=self._std if kind == "regression" else 1.0,
        )

    def _begin(self, weight: Tensor, parent: AdapterWeights | None) -> None:
        """Set the weights [k, H] of the head before the first step; all of them are zero now."""
        if parent is not None and parent.heads:
            (first, *others), own = parent.heads, self.head
            if others or any(getattr(first, name) != getattr(own, name) for name in _SAME):
                raise TrainingError(
                    f"The starting adapter has the head {first.name!r} ({first.kind} of {first.size}, pooling "
                    f"{first.pooling}), which is not the one that these rows ask for and would be lost; start from an "
                    "adapter without heads, or ask for the same head.",
                    code="init_from_mismatch",
                )
            part = next(part for part in parent.parts if part.kind == RowKind.HEAD)
            unit = self._std if own.kind == "scalar" else own.std / first.std
            weight.copy_(torch.from_numpy(as_float32(part.a) / unit))
        elif self._is_embedding:
            if len(weight) > weight.shape[1]:
                raise TrainingError(
                    f"head.dims is {len(weight)}, and a hidden state has {weight.shape[1]} numbers; ask for fewer.",
                    code="invalid_request",
                )
            weight.copy_(torch.eye(*weight.shape))

    def _constant(self) -> Float32Array:
        """The scores [k] that fit the training rows best if all get the same; each class counts half a row more."""
        labels = _labels(self._corpus.train)
        if labels.kind == "number":
            return np.zeros(1, np.float32)
        counts = np.array(list(labels.counts().values()), np.float64) + 0.5
        others = counts.sum() if labels.kind == "class" else len(labels) + 1 - counts
        found: Float32Array = np.log(counts / others).astype(np.float32)
        return found

    def _metrics(self, scores: Float32Array, labels: Labels) -> dict[str, float]:
        if labels.kind == "class":
            return class_metrics(scores, labels.values)
        if labels.kind == "classes":
            return labels_metrics(scores, labels.values)
        return number_metrics(scores[:, 0], labels.values, self._std)

    @property
    def _is_embedding(self) -> bool:
        return self.head.kind == "embedding"

    def _examples(self, parts: Sequence[PackedRows]) -> int:
        return sum(len(part.rows) for part in parts) // self._corpus.train.rows_per_example


def _labels(rows: TokenizedDataset) -> Labels:
    if rows.labels is None:
        raise TrainingError("The rows have no labels that a head could learn.", code="invalid_training_file")
    return rows.labels


def _told_in(corpus: Corpus, mean: float, std: float) -> Corpus:
    """The corpus with its numbers told from `mean` on in units of `std`."""

    def told(rows: TokenizedDataset) -> TokenizedDataset:
        return dataclasses.replace(rows, labels=Labels("number", (), (_labels(rows).values - mean) / std))

    return dataclasses.replace(corpus, train=told(corpus.train), valid=told(corpus.valid))
