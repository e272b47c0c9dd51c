"""DoRA's scales, which take the base: g = m / ‖W + c·B·A‖, a norm for each row (Liu et al. 2024, arXiv:2402.09353).

‖W + c·B·A‖² = ‖W‖² + 2c·Σ B∘(W·Aᵀ) + c²·Σ B∘(B·A·Aᵀ), each sum over the rank. W·Aᵀ is a product that every kind of
weights has, and ‖W‖² is computed once for a base.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tenora.adapters.safetensors_file import Array, as_float32
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, AdapterWeights
from tenora.errors import AdapterFormatError
from tenora.model.decoder import Decoder
from tenora.model.projection import Projection
from tenora.model.weights.base import Weight

_ROWS_AT_ONCE = 512


class RowNorms:
    """Norms of the rows of a base's matrices with low-rank terms added. Safe to call from several threads."""

    def __init__(self, decoder: Decoder) -> None:
        """Of the projections of a decoder; nothing is computed yet."""
        self._device, self._dtype = decoder.device, decoder.dtype
        self._places: dict[int, tuple[Weight, slice]] = {}
        for module in decoder.modules():
            if isinstance(module, Projection):
                for number, (left, right) in enumerate(module.site.slices):
                    self._places[module.site.row + number] = module.weight, slice(left, right)
        self._of_base: dict[int, Tensor] = {}

    @torch.no_grad()
    def of(self, row: int, a: Tensor, bt: Tensor, scaling: float) -> Tensor:
        """‖W + scaling · B · A‖ of each row of a module's W.

        Args:
            row: the module's in the tables.
            a: A [r, in]. bt: Bᵀ [r, out].

        Returns:
            float32 [out], on the device of the base.
        """
        weight, columns = self._places[row]
        crossed = weight.multiply(a.to(self._device, self._dtype))[:, columns].double()
        wide_a, wide_bt = a.to(self._device).double(), bt.to(self._device).double()
        squares = self._squares(row) + 2 * scaling * (wide_bt * crossed).sum(0)
        squares += scaling**2 * (wide_bt * (wide_a @ wide_a.t() @ wide_bt)).sum(0)
        return squares.clamp_min_(0).sqrt_().float()

    def _squares(self, row: int) -> Tensor:
        """‖W‖² of each row of a module's W, float64 [out]."""
        if row not in self._of_base:
            weight, columns = self._places[row]
            every = torch.arange(columns.start, columns.stop, device=self._device)
            pieces = (every[start : start + _ROWS_AT_ONCE] for start in range(0, len(every), _ROWS_AT_ONCE))
            self._of_base[row] = torch.cat([weight.rows(piece).double().square().sum(1) for piece in pieces])
        return self._of_base[row]


def with_scales(weights: AdapterWeights, rows: TableRows, norms: RowNorms) -> AdapterWeights:
    """An adapter with the scales that follow from its magnitudes in their place; one without magnitudes as it is.

    Raises:
        AdapterFormatError: a magnitude's module has no low-rank term, or the sum with W has a row of zeros.
    """
    if not any(part.kind == RowKind.MAGNITUDE for part in weights.parts):
        return weights
    parts = [_scale(part, weights, rows, norms) if part.kind == RowKind.MAGNITUDE else part for part in weights.parts]
    return replace(weights, parts=tuple(parts))


def _scale(part: AdapterPart, weights: AdapterWeights, rows: TableRows, norms: RowNorms) -> AdapterPart:
    module = weights.modules[part.path]
    row = rows.row(RowKind.LOW_RANK, part.path)
    norm = norms.of(row, _wide(module.a), _wide(module.bt), module.scaling)
    scale = torch.from_numpy(as_float32(part.a)) / norm.cpu()
    if not bool(torch.isfinite(scale).all()):
        raise AdapterFormatError(
            f"the magnitudes of {part.path} cannot be served: the base's weights and the low-rank ones add up to a row "
            "of zeros, which has no direction; train it again."
        )
    return AdapterPart.columns(RowKind.SCALE, part.path, scale.numpy())


def _wide(array: Array) -> Tensor:
    return torch.from_numpy(as_float32(array))
