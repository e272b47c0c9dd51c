"""Which head of an adapter a request means, and how what it gives is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tenora.adapters.heads import Head
from tenora.errors import InvalidRequestError

Floats = npt.NDArray[np.float32]
Kind = Literal["classification", "regression", "scalar", "embedding"]
KINDS: Sequence[Kind] = get_args(Kind)
_SHOWN = 16  # heads that an error lists


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants of a text: the scores of a head, or the pooled state itself.

    Attributes:
        kinds: of the heads that will do.
        name: the head's; None: the only one of those kinds.
        state: of which models the state will do where no head is named: of none, of the base, or of any; "always" is
            without a look at the heads.
        size: how many numbers the head must give; None: any.
    """

    kinds: Sequence[Kind]
    name: str | None = None
    state: Literal["none", "base", "any", "always"] = "none"
    size: int | None = None

    def choose(self, model: str, heads: Sequence[Head] | None) -> Head | None:
        """The head of the model's `heads`, which are None for the base; None: the state is wanted.

        Raises:
            InvalidRequestError: there is none, it is of another kind, or there are several and none is named.
        """
        if self.name is None and (self.state == "always" or (self.state != "none" and heads is None)):
            return None
        fitting = [head for head in heads or () if head.kind in self.kinds and self.size in {None, head.size}]
        if self.name is not None:
            fitting = [head for head in fitting if head.name == self.name]
        if len(fitting) == 1:
            return fitting[0]
        if not heads and self.name is None and self.state == "any":
            return None
        raise InvalidRequestError(self._why_not(model, heads, len(fitting)), code="head_not_found", param="head")

    def _why_not(self, model: str, heads: Sequence[Head] | None, fitting: int) -> str:
        what = " or ".join(self.kinds)
        if heads is None:
            return f"{model!r} is the base, which has no heads; name an adapter with a head of {what} as the model."
        if not heads:
            return (
                f"The adapter {model!r} has no heads; name one with a head of {what}, or ask POST /pooling for its "
                "hidden states."
            )
        listed = ", ".join(f"{head.name!r} ({head.kind})" for head in heads[:_SHOWN])
        more = f" and {len(heads) - _SHOWN} more" if len(heads) > _SHOWN else ""
        if fitting:
            return f"The adapter {model!r} has several heads that will do; name one in `head`: {listed}{more}."
        return f"The adapter {model!r} has no such head for this call, which wants {what}; it has {listed}{more}."


def unit(vector: Floats, dimensions: int | None = None) -> Floats:
    """The first `dimensions` numbers, brought to length 1; zeros stay zeros."""
    wide = vector[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(wide))
    return (wide / length if length else wide).astype(np.float32)


def probabilities(head: Head, scores: Floats) -> Floats:
    """Of a classification's labels: a softmax over them, or a sigmoid for each where they exclude nothing."""
    wide = scores.astype(np.float64)
    if head.multi_label:
        # exp of what is not above 0 alone, so that nothing overflows.
        small = np.exp(-np.abs(wide))
        found = np.where(wide >= 0, 1 / (1 + small), small / (1 + small))
    else:
        powers = np.exp(wide - wide.max())
        found = powers / powers.sum()
    return np.asarray(found, np.float32)


def in_units(head: Head | None, scores: Floats) -> Floats:
    """A regression's numbers in the units of its labels; what anything else gives as it is."""
    if head is None or head.kind != "regression":
        return scores
    return (scores.astype(np.float64) * head.std + head.mean).astype(np.float32)


def normalised(head: Head, score: float) -> float:
    """A scalar in standard deviations from the mean that its training measured."""
    return (score - head.mean) / (head.std or 1.0)
