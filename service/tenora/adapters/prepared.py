"""Adapters as they lie in the arena: one flat buffer, made by a background thread, placed by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenora.adapters.safetensors_file import Array, all_finite
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterWeights, LoraModule
from tenora.errors import AdapterFormatError

_FILE_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """What `SlotPool.insert` copies.

    Attributes:
        values: 1-D on the host, or on the device if it comes from there: per module, in the order of the base's rows,
            A [r, in] and then Bᵀ [r, out]. Its type is the arena's, or bfloat16 for an arena of float32 (`is_bf16` of
            `LoraTables`).
        ranks: one per row of the base, 0 for a module that the adapter skips.
        scaling: one per row; 0 where the rank is 0.
        invocation: the tokens from which on it acts (`tenora.adapters.invocation`); empty: on all.
    """

    values: Tensor
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    invocation: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return self.values.nbytes


def prepare(
    weights: AdapterWeights, targets: Sequence[TargetModule], *, dtype: torch.dtype, device: torch.device
) -> PreparedAdapter:
    """Bring an adapter into the layout of an arena.

    bfloat16 weights stay so for a float32 arena on the CPU: the values are the same and every step reads half the
    bytes. Elsewhere the values take the arena's type.

    Args:
        weights: as read.
        targets: the modules of the base; target i has row i.
        dtype: of the arena.
        device: of the arena.

    Raises:
        AdapterFormatError: if it has modules that the base lacks, or values that the arena's type cannot hold.
    """
    modules = [weights.modules.get(target.path) for target in targets]
    if sum(module is not None for module in modules) != len(weights.modules):
        raise AdapterFormatError("The adapter has modules that this base lacks; it is made for another base.")
    present = [module for module in modules if module is not None]
    types = {module.dtype for module in present}
    values = _flat(present, types.pop() if len(types) == 1 else "float32")
    if values.dtype != dtype and not (
        values.dtype == torch.bfloat16 and dtype == torch.float32 and device.type == "cpu"
    ):
        values = _cast(values, dtype)
    return PreparedAdapter(
        values=values,
        ranks=tuple(0 if module is None else module.rank for module in modules),
        scaling=tuple(0.0 if module is None else module.scaling for module in modules),
        invocation=weights.invocation,
    )


def _flat(modules: Sequence[LoraModule], kind: str) -> Tensor:
    """A and Bᵀ of every module, back to back, as one tensor of type `kind`."""
    flat: Array = np.empty(sum(module.a.size + module.b.size for module in modules), dtype=_FILE_TYPES[kind])
    end = 0
    for module in modules:
        for matrix in (module.a, module.bt):
            start, end = end, end + matrix.size
            out = flat[start:end].reshape(matrix.shape)
            if module.dtype == "bfloat16" and kind == "float32":
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
