"""What a version learned from and was measured on, by rows: successors are compared on rows that neither learned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tenora.data.dataset import TokenizedDataset

Keys = npt.NDArray[np.uint64]


class RowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Kept in the registry beside a version that a job made.

    An adapter does well on what it has learned, so rows of the file that made the version in use say nothing about
    whether a newer one is better; what it came to on the rows that it was held back from does.

    Attributes:
        learned: uint64 [n] ascending, as bytes: keys of the examples that it was trained on, or its ancestors were.
        measured: uint64 [m], as bytes: keys of the examples that it was measured on and has not learned. Of a
            cross-validation these are all rows: each was measured by an adapter that had not seen it.
        losses: float64 [m, rows of an example], as bytes; negative log-probabilities, summed over learned tokens.
        whole: False if it started from an adapter whose rows are not known.
    """

    learned: bytes
    measured: bytes
    losses: bytes
    whole: bool = True

    @classmethod
    def of(
        cls,
        train: Keys,
        held_out: Keys,
        losses: npt.NDArray[np.float64],
        *,
        cross_validated: bool,
        parent: RowRecord | None,
        has_parent: bool,
    ) -> RowRecord:
        """The record of a result.

        Args:
            train, held_out: keys.
            losses: float64 [held out, rows of an example].
            cross_validated: what was measured is what was learned, by adapters that had not seen it.
            parent: of the adapter that it started from, if there is one (`has_parent`) and its rows are known.
        """
        before = np.zeros(0, dtype=np.uint64) if parent is None else np.frombuffer(parent.learned, dtype=np.uint64)
        learned = np.union1d(train, before)
        unseen = ~np.isin(held_out, before if cross_validated else learned)
        return cls(
            learned=learned.tobytes(),
            measured=held_out[unseen].tobytes(),
            losses=losses[unseen].astype(np.float64).tobytes(),
            whole=parent.whole if parent is not None else not has_parent,
        )

    @classmethod
    def decode(cls, stored: bytes) -> RowRecord:
        """From `encode`."""
        return msgspec.msgpack.decode(stored, type=cls)

    def encode(self) -> bytes:
        """As it is stored."""
        return msgspec.msgpack.encode(self)

    def has_learned(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Of each key whether it was learned."""
        return np.isin(keys, np.frombuffer(self.learned, dtype=np.uint64))

    def known_losses(self, rows_per_example: int) -> Mapping[int, list[float]]:
        """Losses of the rows of the measured examples, by key."""
        keys: list[Any] = np.frombuffer(self.measured, dtype=np.uint64).tolist()
        losses = np.frombuffer(self.losses, dtype=np.float64)
        if len(losses) != rows_per_example * len(keys):
            return {}  # rows of another kind of job, which are none of ours
        return dict(zip(keys, losses.reshape(-1, rows_per_example).tolist(), strict=True))


def keys_of(dataset: TokenizedDataset) -> Keys:
    """A 64-bit hash of each example: its tokens and which of them are learned. uint64 [examples]."""
    size, offsets = dataset.rows_per_example, dataset.offsets.tolist()
    found = np.zeros(dataset.examples, dtype=np.uint64)
    for example in range(dataset.examples):
        digest = hashlib.blake2b(digest_size=8)
        for row in range(size * example, size * (example + 1)):
            part = slice(offsets[row], offsets[row + 1])
            digest.update(len(dataset.tokens[part]).to_bytes(8, "little"))
            digest.update(dataset.tokens[part].tobytes())
            digest.update(dataset.weights[part].tobytes())
        found[example] = int.from_bytes(digest.digest(), "little")
    return found
