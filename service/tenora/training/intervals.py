"""How sure a mean over held-out rows is. Free of torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
CONFIDENCE = 0.95
_MAX_UNITS = 1024  # more rows are gathered into this many groups, which bounds the time and changes little else
_CHUNK = 500  # resamples at once


def bootstrap(differences: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], *, seed: int) -> tuple[float, float]:
    """Percentile interval of Σ differences / Σ tokens when rows are drawn again with replacement (Efron 1979).

    Rows, not tokens, are drawn: tokens of one row are not independent.

    Args:
        differences: float64 [n], per row, paired: one number for both sides.
        tokens: int64 [n].
    """
    random = np.random.default_rng(seed)
    weights = tokens.astype(np.float64)
    if len(weights) > _MAX_UNITS:
        unit = random.permutation(len(weights)) % _MAX_UNITS
        differences, weights = (
            np.bincount(unit, weights=values, minlength=_MAX_UNITS).astype(np.float64, copy=False)
            for values in (differences, weights)
        )
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = random.integers(0, len(weights), size=(_CHUNK, len(weights)))
        means[start : start + _CHUNK] = differences[drawn].sum(axis=1) / np.maximum(weights[drawn].sum(axis=1), 1.0)
    tail = 100.0 * (1.0 - CONFIDENCE) / 2.0
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)
