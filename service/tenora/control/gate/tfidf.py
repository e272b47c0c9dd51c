"""What a head has to be better than: a linear classifier on which tokens a text has. Free of torch.

Terms are tokens and pairs of neighbours, weighted as scikit-learn's TfidfVectorizer does with sublinear_tf:
(1 + ln tf) · (1 + ln((1 + n) / (1 + df))), rows of length 1. The most frequent terms of at least two rows are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tenora.data.dataset import TokenizedDataset

Float32Array = npt.NDArray[np.float32]
Term = tuple[int, ...]

MAX_TERMS = 4096
MAX_ROWS = 2000
"""To learn from: the classifier takes a decomposition of rows by rows, and whoever waits for the card waits for it."""


def tfidf(train: TokenizedDataset, held_out: TokenizedDataset) -> tuple[Float32Array, Float32Array]:
    """Both as float32 [rows, terms]; what is known of terms is of `train`."""
    counts = [Counter(_terms(train, row)) for row in range(len(train))]
    frequency = Counter(term for row in counts for term in row)
    kept = [term for term, rows in sorted(frequency.items(), key=lambda item: (-item[1], item[0])) if rows > 1]
    place = {term: index for index, term in enumerate(kept[:MAX_TERMS])}
    frequencies = np.array([frequency[term] for term in place], np.float64)
    weight = 1 + np.log((1 + len(train)) / (1 + frequencies))
    measured = [Counter(_terms(held_out, row)) for row in range(len(held_out))]
    return _weighted(counts, place, weight), _weighted(measured, place, weight)


def _terms(rows: TokenizedDataset, row: int) -> Iterator[Term]:
    """The tokens of a row and their pairs, without the place where a head reads."""
    tokens = rows.row(row)[0][:-1].tolist()
    yield from ((token,) for token in tokens)
    yield from pairwise(tokens)


def _weighted(counts: list[Counter[Term]], place: dict[Term, int], weight: npt.NDArray[np.float64]) -> Float32Array:
    found = np.zeros((len(counts), len(place)), np.float32)
    for row, terms in enumerate(counts):
        known = [(place[term], count) for term, count in terms.items() if term in place]
        columns = np.array([column for column, _ in known], np.int64)
        found[row, columns] = (1 + np.log([count for _, count in known])) * weight[columns]
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(found / np.maximum(lengths, 1e-12), np.float32)
