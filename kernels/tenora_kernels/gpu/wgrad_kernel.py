"""Weight gradients, one owner per element: float32, no atomics, rows added in the order of the batch."""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import dot_planes, jit, module_of_block, pick, sum_planes


@jit("row", "slots", "plane_stride")
def lora_wgrad(
    grad: tl.tensor,
    dense: tl.tensor,
    planes: tl.tensor,
    perm: tl.tensor,
    seg_ptr: tl.tensor,
    seg_slot: tl.tensor,
    ranks: tl.tensor,
    scaling: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    dense_stride: tl.tensor,
    c0: tl.tensor,
    c1: tl.tensor,
    c2: tl.tensor,
    n0: tl.tensor,
    n1: tl.tensor,
    n2: tl.tensor,
    plane_stride: tl.tensor,
    module_stride: tl.tensor,
    width: tl.tensor,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bn: tl.constexpr,
    align: tl.constexpr,
    terms: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """grad_j[r, n] += scaling · Σ over the rows of a slot of S_j[row, r] · dense[row, c_j + n].

    Grid: (blocks of bn columns over all modules, segments). dA: S is dS and dense is x (c = 0, n = in). dBᵀ: S is x·Aᵀ
    and dense is dY (c, n = module j's slice of y).
    """
    segment = tl.program_id(1)
    start = tl.load(seg_ptr + segment)
    end = tl.load(seg_ptr + segment + 1)
    if end > start:
        slot = tl.load(seg_slot + segment)
        j, block = module_of_block(tl.program_id(0), n0, n1, bn)
        entry = (row + j) * slots + slot
        rank = tl.load(ranks + entry)
        scale = tl.load(scaling + entry)
        target = grad + tl.multiple_of(tl.load(offsets + entry), align)
        n_size = pick(j, n0, n1, n2)
        n = block * bn + tl.arange(0, bn)
        inside = n < n_size
        source = dense + pick(j, c0, c1, c2) + n[None, :]
        for r_begin in range(0, rank, rb):
            r = r_begin + tl.arange(0, rb)
            acc = tl.zeros([rb, bn], tl.float32)
            for at in range(start, end, bm):
                position = at + tl.arange(0, bm)
                live = position < end
                rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
                d = tl.load(source + rows[:, None] * dense_stride, mask=live[:, None] & inside[None, :], other=0.0)
                s = sum_planes(planes + j * module_stride, plane_stride, width, position, live, r, rank, splits)
                acc = dot_planes(tl.trans(s * scale), d, acc, terms, cast)
            cell = target + r[:, None] * n_size + n[None, :]
            mask = (r < rank)[:, None] & inside[None, :]
            tl.store(cell, tl.load(cell, mask=mask, other=0.0) + acc, mask=mask)
