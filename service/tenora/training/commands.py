"""What a run is told while it is under way, and what it answers, as messages. Free of torch."""

from __future__ import annotations

import msgspec


class AdamWSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one optimizer step is made (Loshchilov and Hutter 2019); the next one may be made otherwise.

    Attributes:
        learning_rate: the step's size.
        weight_decay: decoupled: weights shrink by `learning_rate` · `weight_decay`.
        beta1, beta2: decay of the first and the second moment.
        epsilon: added to the root of the second moment.
    """

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
