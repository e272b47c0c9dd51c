"""Linear heads on features that do not change: ridge in closed form, logistic regression by L-BFGS. float64, numpy.

The problems are those of scikit-learn: with weights W on standardised features and an intercept that is not penalised,

    logistic:  C · Σ_i loss(x_i) + ½ ‖W‖²        ridge:  C · Σ_i (y_i - W x_i - b)² + ‖W‖²   (alpha = 1 / C)

where the loss is the softmax's cross-entropy of one class of three or more, and otherwise the sigmoid's, label by
label. All of it is solved in the coordinates of the features' singular vectors, which leaves the penalty as it is,
makes n rows of F features into n rows of at most n, and tells how steep the loss is in each direction (L-BFGS: Liu and
Nocedal 1989).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Link = Literal["softmax", "sigmoid", "identity"]

TOLERANCE = 1e-6
"""Of the largest gradient of a fit, relative to that of weights that are zero."""
ROUGH = 1e-3
"""The same where fits are only compared with each other."""
_MEMORY = 12
_STEPS = 500
_LEAST_SPREAD = 1e-9  # of a direction, relative to the widest one; narrower ones hold rounding errors


@dataclass(frozen=True, slots=True)
class Linear:
    """scores = W x + b.

    Attributes:
        weight: float64 [k, F].
        bias: float64 [k].
    """

    weight: Float64Array
    bias: Float64Array

    def __call__(self, features: npt.NDArray[np.floating]) -> Float64Array:
        """float64 [n, k]."""
        found: Float64Array = features.astype(np.float64) @ self.weight.T + self.bias
        return found


@dataclass(frozen=True, slots=True)
class Basis:
    """Rows in the coordinates of their singular vectors.

    Attributes:
        rows: float64 [n, r]; their columns have mean 0 and are orthogonal.
        mean, scale: float64 [F], what the features were standardised with.
        vectors: float64 [F, r].
    """

    rows: Float64Array
    mean: Float64Array
    scale: Float64Array
    vectors: Float64Array

    @classmethod
    def of(cls, features: npt.NDArray[np.floating], *, standardised: bool = True) -> Basis:
        """Decompose [n, F]; a column that does not vary is left out of account."""
        x = features.astype(np.float64)
        mean = x.mean(axis=0)
        x -= mean
        scale = x.std(axis=0) if standardised else np.ones(x.shape[1])
        scale[scale < 1e-12] = 1.0
        x /= scale
        small = x @ x.T if len(x) < x.shape[1] else x.T @ x
        squares, found = np.linalg.eigh(small)
        kept = squares > max(squares[-1], 1e-30) * _LEAST_SPREAD
        squares, found = squares[kept], found[:, kept]
        vectors = (x.T @ found) / np.sqrt(squares) if len(x) < x.shape[1] else found
        return cls(x @ vectors, mean, scale, vectors)

    def unfold(self, weight: Float64Array, bias: Float64Array) -> Linear:
        """A head on these rows as one on the features."""
        on_features = (weight @ self.vectors.T) / self.scale
        return Linear(on_features, bias - on_features @ self.mean)


def scores_of(rows: Float64Array, head: tuple[Float64Array, Float64Array]) -> Float64Array:
    """W z + b of rows [n, r]; float64 [n, k]."""
    weight, bias = head
    found: Float64Array = rows @ weight.T + bias
    return found


def losses_of(scores: Float64Array, targets: Float64Array, link: Link) -> Float64Array:
    """What each row costs, float64 [n]; of several labels the mean over them. Nats, or squares of errors.

    Args:
        scores: [n, k].
        targets: [n, k], a one where a class holds and zeros elsewhere, or numbers.
    """
    if link == "identity":
        found = ((scores - targets) ** 2).mean(axis=1)
    elif link == "softmax":
        found = _log_sum(scores)[:, 0] - (scores * targets).sum(axis=1)
    else:
        found = (np.logaddexp(0.0, scores) - scores * targets).mean(axis=1)
    return np.asarray(found, np.float64)


def ridge(
    rows: Float64Array, targets: Float64Array, strengths: Float64Array
) -> list[tuple[Float64Array, Float64Array]]:
    """The ridge heads for each C: W [k, r] and b [k].

    Args:
        rows: [n, r], whatever their means.
        targets: [n, k].
    """
    mean, level = rows.mean(axis=0), targets.mean(axis=0)
    x = rows - mean
    squares, vectors = np.linalg.eigh(x.T @ x)
    seen = vectors.T @ (x.T @ (targets - level))
    heads = []
    for strength in strengths.tolist():
        weight = (vectors @ (seen / (np.maximum(squares, 0.0) + 1.0 / strength)[:, None])).T
        heads.append((weight, level - weight @ mean))
    return heads


def logistic(
    rows: Float64Array,
    targets: Float64Array,
    strength: float,
    link: Link,
    *,
    start: tuple[Float64Array, Float64Array] | None = None,
    tolerance: float = TOLERANCE,
) -> Generator[None, None, tuple[Float64Array, Float64Array]]:
    """The logistic head for one C: W [k, r] and b [k]; it yields after every step.

    A class that all of the rows have, or none, has no finite bias: it gets its share, as if there were half a row more
    of each, and no weights.

    Args:
        rows: [n, r], their columns about orthogonal.
        targets: [n, k], of zeros and ones.
        start: a head to begin with, of another C.
    """
    counts = targets.sum(axis=0)
    open_ = (counts > 0) & (counts < len(rows))
    weight, bias = np.zeros((targets.shape[1], rows.shape[1])), np.log((counts + 0.5) / (len(rows) - counts + 0.5))
    if not open_.any():
        return weight, bias
    problem = _Logistic(rows, targets[:, open_], strength, link)
    first_weight, first_bias = (weight, bias) if start is None else start
    begun = problem.packed(first_weight[open_], first_bias[open_])
    found = yield from _minimise(problem, begun, tolerance)
    weight[open_], bias[open_] = problem.unpacked(found)
    return weight, bias


class _Logistic:
    """The objective over scaled variables, in which it is about as steep in every direction."""

    def __init__(self, rows: Float64Array, targets: Float64Array, strength: float, link: Link) -> None:
        self._targets, self._strength, self._link = targets, strength, link
        steepness = strength * 0.25 * np.append((rows**2).sum(axis=0), len(rows))
        self._scale = 1.0 / np.sqrt(steepness + np.append(np.ones(rows.shape[1]), 0.0))
        self._rows = np.hstack([rows, np.ones((len(rows), 1))]) * self._scale
        self._penalty = np.append(self._scale[:-1] ** 2, 0.0)

    def packed(self, weight: Float64Array, bias: Float64Array) -> Float64Array:
        found: Float64Array = np.hstack([weight, bias[:, None]]) / self._scale
        return found

    def unpacked(self, variables: Float64Array) -> tuple[Float64Array, Float64Array]:
        plain = variables * self._scale
        return plain[:, :-1], plain[:, -1]

    def __call__(self, variables: Float64Array) -> tuple[float, Float64Array]:
        """The objective and its gradient, both over C·n or 1, whichever is more."""
        scores = self._rows @ variables.T
        if self._link == "softmax":
            total = _log_sum(scores)
            loss, likely = float(total.sum() - (scores * self._targets).sum()), np.exp(scores - total)
        else:
            loss = float(np.logaddexp(0.0, scores).sum() - (scores * self._targets).sum())
            likely = 0.5 * (1.0 + np.tanh(0.5 * scores))
        held = variables * self._penalty
        value = self._strength * loss + 0.5 * float((held * variables).sum())
        gradient = self._strength * ((likely - self._targets).T @ self._rows) + held
        return value, np.asarray(gradient)


def _minimise(
    problem: Callable[[Float64Array], tuple[float, Float64Array]], x: Float64Array, tolerance: float
) -> Generator[None, None, Float64Array]:
    """L-BFGS with steps that are halved until the objective falls enough (Armijo). The objective is convex."""
    value, gradient = problem(x)
    usual = float(np.abs(problem(np.zeros_like(x))[1]).max())
    kept: deque[tuple[Float64Array, Float64Array, float]] = deque(maxlen=_MEMORY)
    for _ in range(_STEPS):
        yield
        if float(np.abs(gradient).max()) <= tolerance * usual:
            break
        direction = _direction(gradient, kept)
        slope = float((direction * gradient).sum())
        step, found = 1.0, problem(x + direction)
        while not found[0] <= value + 1e-4 * step * slope and step > 1e-10:
            step *= 0.5
            found = problem(x + step * direction)
        if not found[0] < value:  # as low as float64 tells
            break
        moved, turned = step * direction, found[1] - gradient
        curvature = float((moved * turned).sum())
        if curvature > 0:
            kept.append((moved, turned, 1.0 / curvature))
        x, (value, gradient) = x + moved, found
    return x


def _direction(gradient: Float64Array, kept: deque[tuple[Float64Array, Float64Array, float]]) -> Float64Array:
    """Minus the gradient, bent by what earlier steps told of the curvature (the two-loop recursion)."""
    found = -gradient
    weights = []
    for moved, turned, inverse in reversed(kept):
        weight = inverse * float((moved * found).sum())
        found = found - weight * turned
        weights.append(weight)
    if kept:
        _, turned, inverse = kept[-1]
        found = found / (inverse * float((turned * turned).sum()))
    for (moved, turned, inverse), weight in zip(kept, reversed(weights), strict=True):
        found = found + (weight - inverse * float((turned * found).sum())) * moved
    return found


def _log_sum(scores: Float64Array) -> Float64Array:
    """log Σ exp over the columns, [n, 1]."""
    top = scores.max(axis=1, keepdims=True)
    found: Float64Array = top + np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
    return found


def at_once(work: Generator[None, None, T]) -> T:
    """The result of work that is left now and then, without leaving it."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result
