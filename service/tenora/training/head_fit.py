"""Which head fits features that do not change: compared by cross-validation on training rows, then fitted on all."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tenora.adapters.heads import Head
from tenora.data.dataset import TokenizedDataset
from tenora.data.duplicates import groups_of_similar
from tenora.data.labels import Labels
from tenora.errors import TrainingError
from tenora.training.closed_form import (
    ROUGH,
    Basis,
    Float64Array,
    Int64Array,
    Linear,
    Link,
    logistic,
    losses_of,
    ridge,
    scores_of,
)
from tenora.training.events import HeadCandidate

Float32Array = npt.NDArray[np.float32]
Key = tuple[int, str]
"""What a head reads: a layer, and "last" or "mean"."""

FOLDS = 5
STRENGTHS = tuple(10.0**power for power in range(-5, 3))
"""Values of C that are compared. Hundreds of standardised features and a few hundred rows want small ones."""
_RISES = 2  # of the loss from one value to the next, after which larger ones are not tried
USUAL_STRENGTH = 1e-2  # where there are too few rows to compare


@dataclass(frozen=True, slots=True)
class Chosen:
    """The head.

    Attributes:
        key: what it reads.
        linear: float32 weights, as they are served; of a regression in units of the labels' standard deviation.
        mean, std: of the training rows' labels; 0 and 1 for classes.
        folds: that it was chosen by; 0 if there was nothing to choose.
        candidates: the best strength of each key, the best of all first.
    """

    key: Key
    linear: Linear
    mean: float
    std: float
    folds: int
    candidates: Sequence[HeadCandidate]


class HeadFit:
    """What the training rows' labels ask of a head."""

    def __init__(
        self, rows: TokenizedDataset, settings: Mapping[str, Any], *, seed: int, standardised: bool = True
    ) -> None:
        """`settings` are the method's own; `seed` draws the folds; features are `standardised`, or taken as they are.

        Raises:
            TrainingError: the rows have no labels.
        """
        if rows.labels is None:
            raise TrainingError("The rows have no labels that a head could learn.", code="invalid_training_file")
        self._rows, self._labels, self._settings, self._seed = rows, rows.labels, settings, seed
        self._standardised = standardised
        self.mean, self.std = 0.0, 1.0
        if self._labels.kind == "number":
            self.mean, self.std = float(self._labels.values.mean()), float(self._labels.values.std()) or 1.0
        links: Mapping[str, Link] = {"number": "identity", "classes": "sigmoid", "class": "softmax"}
        self._link = links[self._labels.kind]
        if len(self._labels.names) == 2 and self._labels.kind == "class":
            self._link = "sigmoid"

    def targets(self, labels: Labels) -> Float64Array:
        """What the scores of a head are compared with, float64 [n, k]."""
        if labels.kind == "number":
            units: Float64Array = (labels.values[:, None] - self.mean) / self.std
            return units
        if labels.kind == "classes":
            return np.asarray(labels.values, np.float64)
        return np.asarray(np.eye(len(labels.names))[labels.values])

    def losses(self, scores: Float64Array, labels: Labels) -> Float64Array:
        """Of each row, float64 [n], from the scores of the head as it is served, k of them."""
        link: Link = "softmax" if labels.kind == "class" else self._link
        return losses_of(scores, self.targets(labels), link)

    def right(self, scores: Float64Array, labels: Labels) -> npt.NDArray[np.bool_]:
        """Which rows the head gets right: all of a row's classes, or a number to within a standard deviation."""
        if labels.kind == "class":
            return np.asarray(scores.argmax(axis=1) == labels.values)
        if labels.kind == "classes":
            return np.asarray(((scores > 0) == labels.values).all(axis=1))
        return np.asarray((scores - self.targets(labels))[:, 0] ** 2 < 1)

    def constant(self) -> Float64Array:
        """The scores [k] that fit the training rows best if all get the same: what a head has to be better than."""
        if self._labels.kind == "number":
            return np.zeros(1)
        counts = self.targets(self._labels).sum(axis=0)
        if self._labels.kind == "class":
            return np.asarray(np.log(np.maximum(counts, 0.5) / len(self._labels)))
        return np.asarray(np.log((counts + 0.5) / (len(self._labels) - counts + 0.5)))

    def choose(self, features: Mapping[Key, Float32Array]) -> Generator[None, None, Chosen]:
        """The best head on features [n, H] of the training rows, yielding every few milliseconds of work."""
        asked = self._settings["inverse_regularization"]
        strengths = STRENGTHS if asked is None else (float(asked),)
        folds = self._folds() if len(features) > 1 or len(strengths) > 1 else None
        count = 0 if folds is None else int(folds.max()) + 1
        if count < 2:
            key, strength = next(iter(features)), strengths[0] if len(strengths) == 1 else USUAL_STRENGTH
            yield
            return (yield from self._fitted(features, key, strength, 0, ()))
        found = []
        for key, states in features.items():
            basis = Basis.of(states, standardised=self._standardised)
            yield
            found.append((yield from self._compared(key, basis.rows, folds, strengths)))
        found.sort(key=lambda one: one.loss)
        best = found[0]
        return (yield from self._fitted(features, (best.layer, best.pooling), best.strength, count, found))

    def _fitted(
        self,
        features: Mapping[Key, Float32Array],
        key: Key,
        strength: float,
        folds: int,
        candidates: Sequence[HeadCandidate],
    ) -> Generator[None, None, Chosen]:
        """The head on all training rows."""
        basis = Basis.of(features[key], standardised=self._standardised)
        yield
        if self._link == "identity":
            ((weight, bias),) = ridge(basis.rows, self.targets(self._labels), np.array([strength]))
        else:
            weight, bias = yield from logistic(basis.rows, self._own_targets(), strength, self._link)
        linear = basis.unfold(*self._as_served(weight, bias))
        exact = Linear(*(part.astype(np.float32).astype(np.float64) for part in (linear.weight, linear.bias)))
        return Chosen(key, exact, self.mean, self.std, folds, candidates)

    def _compared(
        self, key: Key, rows: Float64Array, folds: Int64Array | None, strengths: Sequence[float]
    ) -> Generator[None, None, HeadCandidate]:
        """The best strength for one key."""
        if folds is None:
            raise ValueError("nothing to compare by.")
        places = [
            (np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in range(int(folds.max()) + 1)
        ]
        targets = self._own_targets()
        heads: list[Any] = [None] * len(places)
        if self._link == "identity":
            solved = []
            for kept, _ in places:
                solved.append(ridge(rows[kept], targets[kept], np.array(strengths)))
                yield
        best: HeadCandidate | None = None
        rises, last = 0, np.inf
        for number, strength in enumerate(strengths):
            scores = np.zeros((len(rows), len(self.constant())))
            for fold, (kept, held_out) in enumerate(places):
                if self._link == "identity":
                    heads[fold] = solved[fold][number]
                else:
                    heads[fold] = yield from logistic(
                        rows[kept], targets[kept], strength, self._link, start=heads[fold], tolerance=ROUGH
                    )
                scores[held_out] = scores_of(rows[held_out], self._as_served(*heads[fold]))
            loss = float(self.losses(scores, self._labels).mean())
            accuracy = float(self.right(scores, self._labels).mean())
            if best is None or loss < best.loss:
                best = HeadCandidate(layer=key[0], pooling=key[1], strength=strength, loss=loss, accuracy=accuracy)
            rises, last = (rises + 1 if loss > last else 0), loss
            if rises == _RISES:
                break
        if best is None:
            raise ValueError("no strength to compare.")
        return best

    def _own_targets(self) -> Float64Array:
        """What is fitted: of two classes the odds of the second one, as scikit-learn does."""
        targets = self.targets(self._labels)
        return targets[:, 1:] if self._labels.kind == "class" and self._link == "sigmoid" else targets

    def _as_served(self, weight: Float64Array, bias: Float64Array) -> tuple[Float64Array, Float64Array]:
        """A row for each class, of two classes, too."""
        if self._labels.kind == "class" and self._link == "sigmoid":
            return np.vstack([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
        return weight, bias

    def _folds(self) -> Int64Array:
        """The fold of each training row: near-duplicates together, and of each class as many in one as in another."""
        classes = self._labels.values if self._labels.kind == "class" else np.zeros(len(self._labels), np.int64)
        groups = groups_of_similar(self._rows)
        folds = min(FOLDS, len(np.unique(groups)))
        counts = np.zeros((folds, max(len(self._labels.names), 1)))
        found = np.zeros(len(groups), np.int64)
        order = np.argsort(groups, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
        for place in np.random.default_rng(self._seed).permutation(len(members)).tolist():
            own = np.bincount(classes[members[place]], minlength=counts.shape[1])
            fold = min(range(folds), key=lambda fold: (float(counts[fold] @ own), float(counts[fold].sum())))
            counts[fold] += own
            found[members[place]] = fold
        return found


def head_of(chosen: Chosen, labels: Labels, settings: Mapping[str, Any]) -> Head:
    """What is said of the head in the adapter's file."""
    kind = settings["head_type"]
    return Head(
        name=settings["head_name"] or kind,
        kind=kind,
        start=0,
        stop=len(chosen.linear.bias),
        labels=labels.names,
        multi_label=labels.kind == "classes",
        pooling="mean" if chosen.key[1] == "mean" else "last",
        layer=chosen.key[0],
        bias=True,
        mean=chosen.mean,
        std=chosen.std,
    )
