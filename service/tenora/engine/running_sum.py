"""The sum of a sequence's hidden states over its chunks. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class RunningSum:
    """Of hidden states from a sequence's first token on, float64, in the order of the tokens.

    The order does not depend on where chunks begin, so neither do the bits. What was summed needs no second look when
    the sequence is preempted and begins anew.

    Attributes:
        tokens: how many of them are in it.
        total: [H]; None before the first.
    """

    tokens: int = 0
    total: npt.NDArray[np.float64] | None = None

    def add(self, start: int, states: npt.NDArray[np.float32]) -> None:
        """Add those of the states [n, H], of the tokens from `start` on, that are not in it yet."""
        new = states[self.tokens - start :]
        before = np.zeros((1, states.shape[1])) if self.total is None else self.total[None]
        # Along the axis whose elements lie far apart numpy adds one after the other, and never in parts.
        self.total = np.add.reduce(np.concatenate((before, new)), axis=0)
        self.tokens += len(new)

    def mean(self) -> npt.NDArray[np.float32]:
        """[H]. ValueError if nothing was added."""
        if self.total is None:
            raise ValueError("nothing was added.")
        return (self.total / self.tokens).astype(np.float32)
