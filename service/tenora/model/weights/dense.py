"""A frozen matrix as a plain tensor, on any device and in any floating point type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tenora.model.layout import Matrix
from tenora.model.weights.base import FLOATS, Place, Stored

__all__ = ["Dense"]


@dataclass(frozen=True, slots=True)
class Dense:
    """W [out, in] in the compute type; torch multiplies and differentiates.

    Attributes:
        values: the matrix, without a gradient.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """See `Weight`."""
        rows, columns = self.values.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """See `Weight`."""
        return self.values.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight`."""
        return F.linear(x, self.values, bias)

    def rows(self, index: Tensor) -> Tensor:
        """See `Weight`."""
        return F.embedding(index, self.values)

    @classmethod
    def empty(cls, matrix: Matrix, *, dtype: torch.dtype, device: torch.device) -> Dense:
        """Room for a matrix; on a CPU, memory that nobody has touched yet costs nothing."""
        return cls(torch.empty(matrix.output, matrix.input, dtype=dtype, device=device))

    @classmethod
    def supports(cls, matrix: Matrix, types: Mapping[str, str], place: Place) -> bool:  # noqa: ARG003  # of any place
        """See `Kind`."""
        return all(types.get(stored.name) in FLOATS for stored in cls.tensors(matrix))

    @classmethod
    def tensors(cls, matrix: Matrix) -> list[Stored]:
        """See `Kind`."""
        return [Stored(f"{path}.weight", (rows, matrix.input)) for path, rows in matrix.parts]

    @classmethod
    def read(cls, matrix: Matrix, tensor: Callable[[str], Tensor], place: Place) -> Dense:
        """See `Kind`: every tensor is copied once, into its rows."""
        weight = cls.empty(matrix, dtype=place.dtype, device=place.device)
        start = 0
        for name, (rows, _), _ in cls.tensors(matrix):
            weight.values[start : start + rows].copy_(tensor(name))
            start += rows
        return weight
