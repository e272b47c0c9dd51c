"""What a head is worth: how often it is right on the held-out rows, and beside what costs less than a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tenora.control.gate.card import HeadBeside, HeadCard, Measure, Other, verdict_of
from tenora.control.gate.tfidf import MAX_ROWS, tfidf
from tenora.data.dataset import TokenizedDataset
from tenora.data.labels import Labels
from tenora.training.closed_form import Float64Array, at_once
from tenora.training.events import HeadOutcome
from tenora.training.head_fit import HeadFit
from tenora.training.head_metrics import class_metrics, labels_metrics, number_metrics
from tenora.training.intervals import bootstrap

MAX_CONFUSION = 32
"""Classes beyond which the table of confusions is left out."""
_NORMAL = 1.959963984540054  # of which 95 % of a normal distribution lies within


class HeadShots(msgspec.Struct, frozen=True, kw_only=True):
    """What the base said of held-out rows behind `shots` labelled training rows: of each row the class."""

    shots: int
    rows: list[int]
    said: list[int]


def head_card(
    settings: Mapping[str, Any],
    outcome: HeadOutcome,
    train: TokenizedDataset,
    held_out: TokenizedDataset,
    shots: HeadShots | None,
    *,
    seed: int,
) -> HeadCard | None:
    """From the head's scores of the held-out rows; None if these have no labels.

    Args:
        settings: the method's own.
        train: of all tasks, for what needs no head.
    """
    labels = held_out.labels
    if settings["head_type"] == "embedding" and outcome.metrics:
        return _embedding(outcome.metrics, held_out.examples)
    if labels is None or train.labels is None or not len(held_out):
        return None
    scores = np.array(outcome.scores, np.float64)
    right = _right(scores, labels)
    low, high = (None, None) if right is None else wilson(int(right.sum()), len(right))
    return HeadCard(
        type=settings["head_type"],
        labels=list(labels.names),
        rows=len(held_out),
        accuracy=None if right is None else float(right.mean()),
        low=low,
        high=high,
        metrics=_metrics(scores, labels),
        confusion=_confusion(scores, labels),
        folds=outcome.folds,
        candidates=outcome.candidates,
        beside=_beside(settings, scores, train, held_out, shots, seed=seed),
    )


def _embedding(metrics: Mapping[str, float], pairs: int) -> HeadCard:
    """Right is an anchor whose own text is the nearest of all."""
    nearest = metrics["recall_at_1"]
    low, high = wilson(round(nearest * pairs), pairs)
    return HeadCard(
        type="embedding",
        labels=[],
        rows=pairs,
        accuracy=nearest,
        low=low,
        high=high,
        metrics=dict(metrics),
        confusion=None,
        folds=0,
        candidates=[],
        beside=[],
    )


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), which holds for few rows and shares near 0 or 1, too."""
    share, square = hits / rows, _NORMAL**2 / rows
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _right(scores: Float64Array, labels: Labels) -> npt.NDArray[np.bool_] | None:
    if labels.kind == "number":
        return None
    if labels.kind == "classes":
        return np.asarray(((scores > 0) == labels.values).all(axis=1))
    return np.asarray(scores.argmax(axis=1) == labels.values)


def _metrics(scores: Float64Array, labels: Labels) -> dict[str, float]:
    if labels.kind == "class":
        return class_metrics(scores, labels.values)
    if labels.kind == "classes":
        return labels_metrics(scores, labels.values)
    return number_metrics(scores[:, 0], labels.values, 1.0)


def _confusion(scores: Float64Array, labels: Labels) -> list[list[int]] | None:
    count = len(labels.names)
    if labels.kind != "class" or count > MAX_CONFUSION:
        return None
    table = np.zeros((count, count), np.int64)
    np.add.at(table, (labels.values, scores.argmax(axis=1)), 1)
    found: list[list[int]] = table.tolist()
    return found


def _beside(
    settings: Mapping[str, Any],
    scores: Float64Array,
    train: TokenizedDataset,
    held_out: TokenizedDataset,
    shots: HeadShots | None,
    *,
    seed: int,
) -> list[HeadBeside]:
    labels = held_out.labels
    if labels is None:
        return []
    if len(train) > MAX_ROWS:
        train = train.select(np.sort(np.random.default_rng(seed).permutation(len(train))[:MAX_ROWS]))
    fit = HeadFit(train, {**settings, "inverse_regularization": None}, seed=seed, standardised=False)
    usual = np.tile(fit.constant(), (len(held_out), 1)) * fit.std + fit.mean
    learned, measured = tfidf(train, held_out)
    found = [_compared("most common", scores, usual, labels, seed=seed)]
    if learned.shape[1]:
        linear = at_once(fit.choose({(0, "tf-idf"): learned})).linear
        found.append(_compared("tf-idf", scores, linear(measured) * fit.std + fit.mean, labels, seed=seed))
    if shots is not None and shots.rows and labels.kind == "class":
        rows = np.array(shots.rows, np.int64)
        said = np.eye(len(labels.names))[shots.said]
        beside = _compared("few-shot base", scores[rows], said, labels.select(rows), seed=seed)
        found.append(msgspec.structs.replace(beside, shots=shots.shots))
    return found


def _compared(name: Other, head: Float64Array, other: Float64Array, labels: Labels, *, seed: int) -> HeadBeside:
    measure: Measure = "squared error" if labels.kind == "number" else "accuracy"
    ours, theirs = _values(head, labels), _values(other, labels)
    low, high = bootstrap(ours - theirs, np.ones(len(ours), np.int64), seed=seed)
    # A verdict is of losses, of which less is better.
    bounds = (low, high) if measure == "squared error" else (-high, -low)
    return HeadBeside(
        name=name,
        rows=len(ours),
        measure=measure,
        head=float(ours.mean()),
        other=float(theirs.mean()),
        difference=float((ours - theirs).mean()),
        low=low,
        high=high,
        verdict=verdict_of(len(ours), *bounds),
    )


def _values(scores: Float64Array, labels: Labels) -> Float64Array:
    """Of each row whether it is right, or its squared error."""
    right = _right(scores, labels)
    return (scores[:, 0] - labels.values) ** 2 if right is None else right.astype(np.float64)
