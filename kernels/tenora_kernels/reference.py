"""The specification of the low-rank op: one token at a time, differentiable, float64 by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenora_kernels.layout import LoraSite, LoraTables


def add_lora_reference(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    tables: LoraTables,
    slot_of_row: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y[t, slice_j] + c · (x[t] · Aᵀ) · Bᵀ`, token by token.

    Args:
        y: [T, out].
        x: [T, in].
        site: the projection group.
        tables: where the weights lie. An arena that requires a gradient gets dA and dBᵀ in its `.grad`.
        slot_of_row: [T], -1 for a row of the base.
        dtype: every operand is cast to it first.

    Returns:
        A new [T, out] tensor in `dtype`, with autograd history of y, x and the arena.
    """
    out = y.to(dtype).clone()
    for t, slot in enumerate(slot_of_row):
        for j, (start, stop) in enumerate(site.slices):
            row = site.row + j
            if slot < 0 or tables.rank(row, slot) == 0:
                continue
            shrunk = tables.a(row, slot).to(dtype) @ x[t].to(dtype)
            out[t, start:stop] += tables.scale(row, slot) * (shrunk @ tables.bt(row, slot).to(dtype))
    return out
