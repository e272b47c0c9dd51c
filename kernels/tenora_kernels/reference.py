"""The specifications of the ops: one token at a time, in plain torch, float64 by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenora_kernels.flags import BIAS_OUTSIDE, PARALLEL, WITH_RESIDUAL
from tenora_kernels.layout import BottleneckSite, LoraSite, LoraTables
from tenora_kernels.torch_parts import activation_of


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
        site: whose modules adapt y.
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


def scale_columns_reference(
    y: Tensor,
    site: LoraSite,
    tables: LoraTables,
    slot_of_row: Sequence[int],
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`g ∘ y[t, slice_j]`, or `b + g ∘ (y[t, slice_j] - b)` in a slot with BIAS_OUTSIDE, token by token.

    Args:
        y: [T, out], with the low-rank term and the bias.
        site: whose modules scale y.
        tables: where the scales lie. An arena that requires a gradient gets dg in its `.grad`.
        slot_of_row: [T], -1 for a row of the base.
        bias: [out], of the projection.
        dtype: every operand is cast to it first.

    Returns:
        A new [T, out] tensor in `dtype`, with autograd history of y and the arena.
    """
    out = y.to(dtype).clone()
    for t, slot in enumerate(slot_of_row):
        for j, (start, stop) in enumerate(site.slices):
            if slot < 0 or site.scale_row is None or tables.rank(site.scale_row + j, slot) == 0:
                continue
            kept: Tensor | float = 0.0
            if bias is not None and int(tables.flags[slot]) & BIAS_OUTSIDE:
                kept = bias[start:stop].to(dtype)
            scale = tables.a(site.scale_row + j, slot)[0].to(dtype)
            out[t, start:stop] = kept + scale * (out[t, start:stop].clone() - kept)
    return out


def add_bottleneck_reference(
    y: Tensor,
    x: Tensor,
    site: BottleneckSite,
    tables: LoraTables,
    slot_of_row: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y[t] + s · (U · f(D · h + b_d) + b_u)`, token by token.

    h is y[t], or x[t] in a slot with PARALLEL, or y[t] + x[t] in one with WITH_RESIDUAL.

    Args:
        y: [T, H], a block's output. x: [T, H], the residual stream before it.
        site: which block's.
        tables: where D, Uᵀ, b_d, b_u lie; s is the scaling of the site's row. Gradients as `add_lora_reference`.
        slot_of_row: [T], -1 for a row of the base.
        dtype: every operand is cast to it first.

    Returns:
        A new [T, H] tensor in `dtype`, with autograd history of y, x and the arena.
    """
    rows: list[Tensor] = []
    for t, slot in enumerate(slot_of_row):
        own = y[t].to(dtype)
        if slot >= 0 and tables.rank(site.row, slot):
            flags = int(tables.flags[slot])
            read = x[t].to(dtype) if flags & PARALLEL else own + x[t].to(dtype) if flags & WITH_RESIDUAL else own
            inner = tables.a(site.row, slot).to(dtype) @ read
            if tables.rank(site.inner_row, slot):
                inner = inner + tables.a(site.inner_row, slot)[:, 0].to(dtype)
            outer = activation_of(flags)(inner) @ tables.bt(site.row, slot).to(dtype)
            if tables.rank(site.outer_row, slot):
                outer = outer + tables.a(site.outer_row, slot)[0].to(dtype)
            own = own + tables.scale(site.row, slot) * outer
        rows.append(own)
    return torch.stack(rows) if rows else y.to(dtype)


def write_pages(keys: Tensor, values: Tensor, kv_slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store new keys and values in a paged cache, row by row; a row with a negative slot stores nothing.

    Args:
        keys, values: [blocks, block_size, Hkv, D]; changed in place.
        kv_slots: int [rows], block · block_size + offset.
        k, v: [rows, Hkv, D].
    """
    for row, slot in enumerate(kv_slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, keys.shape[1])
            keys[block, offset], values[block, offset] = k[row], v[row]


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    contexts: Tensor,
    window: int | None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention of one new token per row to the last `window` keys of its context, row by row.

    Args:
        q: [rows, Hq, D]; query head h reads key head h // (Hq / Hkv).
        keys, values: [blocks, block_size, Hkv, D].
        tables: int [rows, width], the blocks of each row.
        contexts: int [rows], keys of each row, the new token's own included; 0 gives zeros.
        window: how many keys a token sees, itself included; None is all.
        dtype: every operand is cast to it first.

    Returns:
        [rows, Hq · D] in the type of q.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // keys.shape[2]
    for row, context in enumerate(contexts.tolist()):
        if context == 0:
            continue
        position = torch.arange(0 if window is None else max(0, context - window), context, device=q.device)
        block, offset = tables[row][position // keys.shape[1]].long(), position % keys.shape[1]
        k, v = (x[block, offset].to(dtype).repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("hd,shd->hs", q[row].to(dtype), k) / q.shape[2] ** 0.5
        out[row] = torch.einsum("hs,shd->hd", scores.softmax(dim=1), v).to(q.dtype)
    return out.flatten(1)
