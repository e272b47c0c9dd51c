"""Adapters as they lie in the arena: one flat buffer, made by a background thread, placed by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenora.adapters.safetensors_file import Array, all_finite
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, AdapterWeights, LoraModule
from tenora.errors import AdapterFormatError

_FILE_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """What `SlotPool.insert` copies.

    Attributes:
        values: 1-D on the host, or on the device if it comes from there: per row of the base, in their order, A [r, in]
            and then Bᵀ [r, out]. Its type is the arena's, or bfloat16 for an arena of float32 (`is_bf16` of
            `LoraTables`).
        ranks: one per row of the base, 0 for one that the adapter does not fill.
        scaling: one per row; 0 where the rank is 0.
        flags: see `LoraTables`.
        invocation: the tokens from which on it acts (`tenora.adapters.invocation`); empty: on all.
    """

    values: Tensor
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    flags: int = 0
    invocation: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return self.values.nbytes


def prepare(weights: AdapterWeights, rows: TableRows, *, dtype: torch.dtype, device: torch.device) -> PreparedAdapter:
    """Bring an adapter into the layout of an arena.

    bfloat16 weights stay so for a float32 arena on the CPU: the values are the same and every step reads half the
    bytes. Elsewhere the values take the arena's type.

    Args:
        weights: as read.
        rows: of the base.
        dtype: of the arena.
        device: of the arena.

    Raises:
        AdapterFormatError: if it has modules that the base lacks, or values that the arena's type cannot hold.
    """
    filled = _filled(weights, rows)
    types = {matrix.dtype for matrix in filled if matrix is not None}
    values = _flat([matrix for matrix in filled if matrix is not None], types.pop() if len(types) == 1 else "float32")
    if values.dtype != dtype and not (
        values.dtype == torch.bfloat16 and dtype == torch.float32 and device.type == "cpu"
    ):
        values = _cast(values, dtype)
    ranks = tuple(0 if matrix is None else matrix.rank for matrix in filled)
    return PreparedAdapter(
        values=values,
        ranks=ranks,
        scaling=tuple(0.0 if matrix is None else matrix.scaling for matrix in filled),
        flags=weights.flags | rows.flags(ranks),
        invocation=weights.invocation,
    )


def _filled(weights: AdapterWeights, rows: TableRows) -> list[LoraModule | AdapterPart | None]:
    """What an adapter has in each row of the base."""
    filled: list[LoraModule | AdapterPart | None] = [None] * len(rows)
    try:
        for path, module in weights.modules.items():
            filled[rows.row(RowKind.LOW_RANK, path)] = module
        for part in weights.parts:
            filled[rows.row(part.kind, part.path)] = part
    except KeyError:
        raise AdapterFormatError("The adapter has modules that this base lacks; it is made for another base.") from None
    return filled


def _flat(filled: Sequence[LoraModule | AdapterPart], kind: str) -> Tensor:
    """A and Bᵀ of every row, back to back, as one tensor of type `kind`."""
    flat: Array = np.empty(sum(one.a.size + one.bt.size for one in filled), dtype=_FILE_TYPES[kind])
    end = 0
    for one in filled:
        for matrix in (one.a, one.bt):
            start, end = end, end + matrix.size
            out = flat[start:end].reshape(matrix.shape)
            if one.dtype == "bfloat16" and kind == "float32":
                np.left_shift(matrix, 16, out=out.view(np.uint32), dtype=np.uint32)
            else:
                out[...] = matrix  # numpy copies small transposed matrices four times as fast as torch
    return torch.from_numpy(flat).view(torch.bfloat16) if kind == "bfloat16" else torch.from_numpy(flat)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    cast = values.to(dtype)
    bits = cast.view(torch.uint16) if dtype == torch.bfloat16 else cast
    if dtype.itemsize < 4 and not all_finite(bits.numpy()):
        name = str(dtype).removeprefix("torch.")
        raise AdapterFormatError(f"The adapter holds values beyond {name}; serve the base in a wider type.")
    return cast
