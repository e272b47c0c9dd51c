"""A frozen matrix packed for the CPU's kernels: float32 or bfloat16 in memory, float32 products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tenora.model.layout import Matrix
from tenora.model.weights.base import Place, Stored, derived_product
from tenora.model.weights.dense import Dense
from tenora_kernels.cpu.products.gemm import PackedMatrix, matmul, unpack
from tenora_kernels.cpu.runtime.team import Team

__all__ = ["Packed"]


@dataclass(frozen=True, slots=True)
class Packed:
    """W in panels; a team of threads multiplies.

    Attributes:
        matrix: the panels.
        team: who computes.
    """

    matrix: PackedMatrix
    team: Team

    @property
    def shape(self) -> tuple[int, int]:
        """See `Weight`."""
        return self.matrix.out_features, self.matrix.in_features

    @property
    def nbytes(self) -> int:
        """See `Weight`."""
        return self.matrix.panels.nbytes

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Weight`; float32."""
        return derived_product(x, self, bias)

    def rows(self, index: Tensor) -> Tensor:
        """See `Weight`; float32."""
        return self.matrix.rows(index)

    def forward(self, x: Tensor) -> Tensor:
        """See `Derived`."""
        return matmul(x, self.matrix, self.team)

    def backward(self, dy: Tensor) -> Tensor:
        """See `Derived`. W is unpacked once for all the rows: no second copy stays in memory."""
        return dy @ unpack(self.matrix, self.team)

    @classmethod
    def supports(cls, matrix: Matrix, types: Mapping[str, str], place: Place) -> bool:
        """See `Kind`."""
        return place.packed is not None and place.team is not None and Dense.supports(matrix, types, place)

    @classmethod
    def tensors(cls, matrix: Matrix) -> list[Stored]:
        """See `Kind`."""
        return Dense.tensors(matrix)

    @classmethod
    def read(cls, matrix: Matrix, tensor: Callable[[str], Tensor], place: Place) -> Packed:
        """See `Kind`."""
        if place.packed is None or place.team is None:
            raise ValueError("packed matrices need a team and a type.")
        dense = Dense.read(matrix, tensor, place._replace(dtype=place.packed))
        return cls(PackedMatrix.pack(dense.values), place.team)
