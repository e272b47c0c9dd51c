"""What training asks of whoever computes a base's layers: a call per layer and direction.

Every executor adds dA and dBᵀ of each slot to `context.lora.tables.grad`, and none wants grad mode to be on around it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from torch import Tensor

from tenora.model.context import ForwardContext

__all__ = ["Keep", "LayerExecutor", "LayerPass"]


class Keep(Enum):
    """What a pass keeps for its backward pass."""

    NOTHING = "nothing"
    """There is no backward pass."""
    INPUTS = "inputs"
    """The layers' inputs: each layer then runs a second time."""
    ALL = "all"
    """All that a backward pass needs."""


class LayerPass(Protocol):
    """One stream's way through the layers, up and down again."""

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] after layer `index`; layers come in order. Valid until the layer's `backward`."""
        ...

    def backward(self, index: int, d_out: Tensor, *, need_dx: bool = True) -> Tensor | None:
        """From the gradient of the layer's output [T, H] to that of its input, and to the adapters' gradients.

        Layers come in the opposite order. None if `need_dx` is false.
        """
        ...

    def close(self) -> None:
        """Free what is still kept; also for a pass that is abandoned."""
        ...


class LayerExecutor(Protocol):
    """Computes the layers of one base."""

    def supports(self, context: ForwardContext) -> bool:
        """Whether it computes such a stream."""
        ...

    def begin(
        self, context: ForwardContext, keep: Keep, before: Callable[[int], None] | None, first: int = 0
    ) -> LayerPass:
        """Begin a pass over a stream that is supported.

        Args:
            context: with `PackedAttention`; unchanged until the pass is over, as are the tables of its adapters.
            keep: what for.
            before: called with a layer's index before it runs, every time that it does.
            first: the last layer of the backward pass; of those below it nothing is kept.
        """
        ...

    def kept_bytes_per_token(self, rank: int) -> int:
        """About what a pass with `Keep.ALL` keeps for each token, beside buffers that do not grow with the layers.

        Args:
            rank: the largest of the stream's adapters, all modules adapted.
        """
        ...

    def release(self) -> None:
        """Give the memory of finished passes back to the system: when no training is left."""
        ...
