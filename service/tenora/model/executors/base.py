"""What the engine asks of whoever computes a base's steps, and what a step is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Batch", "Executor", "Integers"]

Integers = npt.NDArray[np.integer[Any]]


class Batch(NamedTuple):
    """A step on the host: the new tokens of B sequences as one stream of T.

    Attributes:
        token_ids: [T].
        positions: [T], of each token in its sequence: the tokens before it.
        kv_slots: [T], where its keys and values go.
        adapters: [B], adapter slots, in the order of `LoraTables.order`: -1, sequences of the base, then slot after
            slot, those with scales or bottlenecks last.
        block_tables: [B, width] with any strides; what lies behind a context is not read.
        lengths: [T], what each token is rotated for; None if the model does not care.
        query_start: [B + 1], from 0 to T: sequence b's tokens are query_start[b] … query_start[b + 1]. None: one each.
    """

    token_ids: npt.ArrayLike
    positions: Integers
    kv_slots: Integers
    adapters: Integers
    block_tables: Integers
    lengths: Integers | None = None
    query_start: Integers | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.positions)

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one new token."""
        return len(self.positions) == len(self.adapters)

    @property
    def starts(self) -> Integers:
        """`query_start`, written out."""
        return np.arange(len(self.adapters) + 1) if self.query_start is None else self.query_start

    @property
    def contexts(self) -> Integers:
        """[B], tokens of each sequence, the new ones included."""
        contexts: Integers = self.positions[self.starts[1:] - 1] + 1
        return contexts

    @property
    def adapter_of_token(self) -> Integers:
        """[T], the adapter slot of each token."""
        return self.adapters if self.decodes else np.repeat(self.adapters, np.diff(self.starts))


class Executor(Protocol):
    """Computes the steps of one base, with one KV cache and the adapters of one pool."""

    def run(self, batch: Batch) -> Tensor:
        """Hidden states [T, H] after the final norm, valid until the next call; the cache is changed in place.

        Wants to be called without grad mode.
        """
        ...

    def states(self, batch: Batch, layers: Sequence[int]) -> Sequence[Tensor]:
        """The same with hidden states [T, H] of each of the depths `layers`, as `Decoder.states` counts them."""
        ...

    def warm_up(self, max_tokens: int) -> tuple[int, ...]:
        """Compile and capture what can be told beforehand, while nothing runs.

        Returns:
            Lengths of prompts, up to `max_tokens`, that should be run once for what only running compiles.
        """
        ...
