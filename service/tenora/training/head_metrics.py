"""How good scores of held-out rows are, beside their loss. Plain numpy, so that nobody waits for torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
RECALLS = (1, 5, 10)
_BINS = 10  # of confidence, as in Guo et al. 2017


def softmax(scores: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of each row [n, k], float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    found: npt.NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return found


def f1_scores(said: Bools, true: Bools) -> npt.NDArray[np.float64]:
    """F1 of each column of marks [n, k]; 0 for one that is neither said nor true anywhere."""
    hits = (said & true).sum(axis=0)
    found: npt.NDArray[np.float64] = 2 * hits / np.maximum(said.sum(axis=0) + true.sum(axis=0), 1)
    return found


def macro_f1(said: Bools, true: Bools) -> float:
    """The mean F1 over the columns that are said or true somewhere, as scikit-learn takes it."""
    there = said.any(axis=0) | true.any(axis=0)
    return float(f1_scores(said, true)[there].mean()) if there.any() else 0.0


def auroc(scores: Floats, true: Bools) -> float | None:
    """Area under the ROC curve, one class against the others, the mean over classes that rows have and lack.

    None if there is none of them. Equal scores count half (Mann and Whitney).
    """
    areas = [_area(scores[:, column], true[:, column]) for column in range(true.shape[1])]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def expected_calibration_error(probabilities: Floats, target: npt.NDArray[np.int64]) -> float:
    """Mean distance between confidence and accuracy over ten bins of confidence, by their rows (Guo et al. 2017)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == target
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.abs(np.bincount(place, confidence, _BINS) - np.bincount(place, right, _BINS))
    return float(gaps.sum() / len(target))


def class_metrics(scores: Floats, target: npt.NDArray[np.int64]) -> dict[str, float]:
    """Of one class each: `macro_f1`, `auroc`, `calibration_error`."""
    classes = np.arange(scores.shape[1])
    true, probabilities = target[:, None] == classes, softmax(scores)
    found = {
        "macro_f1": macro_f1(scores.argmax(axis=1)[:, None] == classes, true),
        "calibration_error": expected_calibration_error(probabilities, target),
    }
    area = auroc(probabilities, true)
    return found if area is None else found | {"auroc": area}


def labels_metrics(scores: Floats, true: Bools) -> dict[str, float]:
    """Of several labels each: `macro_f1`, `micro_f1`, `auroc`."""
    said = scores > 0
    found = {"macro_f1": macro_f1(said, true), "micro_f1": macro_f1(said.reshape(-1, 1), true.reshape(-1, 1))}
    area = auroc(scores, true)
    return found if area is None else found | {"auroc": area}


def number_metrics(scores: Floats, target: Floats, std: float) -> dict[str, float]:
    """Of numbers, told in units of `std`: `mean_absolute_error` in their own unit, and `r2`."""
    errors = scores.astype(np.float64) - target
    spread = float(np.square(target - target.mean()).sum())
    found = {"mean_absolute_error": float(np.abs(errors).mean() * std)}
    return found if not spread else found | {"r2": 1 - float(np.square(errors).sum()) / spread}


def recalls(anchors: Floats, candidates: Floats, own: npt.NDArray[np.int64]) -> dict[str, float]:
    """`recall_at_1`, … : how often an anchor's own candidate is among its k nearest by cosine.

    Args:
        anchors: [n, H]; candidates: [m, H].
        own: [n], place of each anchor's among the candidates. One that is as near as it counts as nearer.
    """
    similar = _unit(anchors) @ _unit(candidates).T
    near = np.take_along_axis(similar, own[:, None], axis=1)
    rank = (similar >= near).sum(axis=1)  # itself included, so 1 is the best
    return {f"recall_at_{k}": float((rank <= k).mean()) for k in RECALLS}


def _unit(vectors: Floats) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    found: npt.NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return found


def _area(scores: Floats, true: Bools) -> float | None:
    positive, negative = int(true.sum()), int((~true).sum())
    if not positive or not negative:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place]  # of equal scores the mean of theirs
    return float((ranks[true].sum() - positive * (positive + 1) / 2) / (positive * negative))
