"""What the decoder needs of a frozen matrix, whatever it is made of, and what loading needs of a kind of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tenora.model.layout import Matrix
from tenora_kernels.cpu.runtime.team import Team

__all__ = ["FLOATS", "Derived", "Kind", "Place", "Stored", "Weight", "derived_product"]

FLOATS = frozenset({"BF16", "F16", "F32"})
"""Types of unquantised tensors, as safetensors spells them."""


class Weight(Protocol):
    """A frozen matrix W [out, in]: gradients flow through it, never to it."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it takes where it lies."""
        ...

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · Wᵀ + bias, [T, in] to [T, out], in the compute type; differentiable by x."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` (int64 [T]) of W, [T, in], in the compute type."""
        ...


class Derived(Protocol):
    """A weight whose product torch cannot differentiate: it says itself what goes back."""

    def forward(self, x: Tensor) -> Tensor:
        """x · Wᵀ."""
        ...

    def backward(self, dy: Tensor) -> Tensor:
        """dy · W, [T, out] to [T, in]."""
        ...


def derived_product(x: Tensor, weight: Derived, bias: Tensor | None) -> Tensor:
    """`Weight.multiply` of a weight that has `forward` and `backward`."""
    y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]  # torch
    return y if bias is None else y + bias


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Derived) -> Tensor:
        ctx.weight = weight
        return weight.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.backward(dy), None


class Place(NamedTuple):
    """Where and with what a decoder computes.

    Attributes:
        device, dtype: of what it computes.
        team: threads of the CPU's kernels; None elsewhere.
        packed: element type of packed matrices if the compiled stack runs this base, else None. A stack has one type.
    """

    device: torch.device
    dtype: torch.dtype
    team: Team | None = None
    packed: torch.dtype | None = None


class Stored(NamedTuple):
    """A tensor that a checkpoint must hold: its name, its shape, and the types that it may have there."""

    name: str
    shape: tuple[int, ...]
    types: frozenset[str] = FLOATS


class Kind(Protocol):
    """A way to hold a matrix."""

    def supports(self, matrix: Matrix, types: Mapping[str, str], place: Place) -> bool:
        """Whether this kind reads the matrix for `place`. `types`: the checkpoint's tensors and their types."""
        ...

    def tensors(self, matrix: Matrix) -> Sequence[Stored]:
        """What the checkpoint must hold of the matrix."""
        ...

    def read(self, matrix: Matrix, tensor: Callable[[str], Tensor], place: Place) -> Weight:
        """Read the matrix; `tensor` gives those of `tensors`, each once, on the CPU and mapped from the file."""
        ...
