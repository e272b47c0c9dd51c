"""What every readout offers."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora_kernels.layout import LoraTables


class Read(NamedTuple):
    """What a readout found at n positions of a stream of T tokens.

    Attributes:
        loss: float32 [n].
        correct: bool [n], whether no score was above the target's.
        slope: [T, H], the gradient of Σ coefficient · loss with respect to the hidden states; None if nobody wanted it.
        scores: float32 [n, k] of readouts whose scores are few; else None.
    """

    loss: Tensor
    correct: Tensor
    slope: Tensor | None
    scores: Tensor | None = None


class Readout(Protocol):
    """The final norm and a head on it. What it learns, if anything, it adds to gradients of its own."""

    def see(self, layer: int, hidden: Tensor, predict_at: Tensor) -> None:
        """Look at what comes out of a layer below the last, on the way up.

        Args:
            layer: counted from -2 for the one below the last.
            hidden: [T, H], which may be overwritten afterwards.
            predict_at: as of `read`.
        """
        ...

    def read(
        self, hidden: Tensor, predict_at: Tensor, targets: Tensor, coefficients: Tensor | None
    ) -> Generator[None, None, Read]:
        """Score positions of a stream, yielding now and then. Grad mode is expected to be off around it.

        Args:
            hidden: [T, H], the last layer's output, before the final norm.
            predict_at: int64 [n], rows of `hidden`; a row may occur more than once.
            targets: what each position's loss is about: int64 [n], a token, or float32 [n, w], what a head learns.
            coefficients: float32 [n]; None if nobody wants a gradient.
        """
        ...


class ReadPositions(NamedTuple):
    """Where a pass is read.

    Attributes:
        slots: int64 [n], of each position the slot of its adapter; `tenora_kernels.layout.BASE` without one.
        starts: int64 [n], where the sequence that a position is in begins in the stream.
        tables: where the adapters of the pass lie; None if it has none.
    """

    slots: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    tables: LoraTables | None


class ReadoutKind(Protocol):
    """What rows are to be read by, before it is known which others they pass with: only rows of one kind do."""

    def over(self, decoder: Decoder, where: ReadPositions, /) -> Readout:
        """The readout of a pass over the base."""
        ...
