"""The base projection with the low-rank term in it: y is written once instead of written, read and written again."""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import dot_low, dot_planes, jit, module_of_block, pick, sum_planes


@jit("row", "slots", "tiles", "plane_stride")
def gemm_lora(
    y: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    perm: tl.tensor,
    tile_ptr: tl.tensor,
    tile_slot: tl.tensor,
    ranks: tl.tensor,
    scaling: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    tiles: tl.tensor,
    y_stride: tl.tensor,
    x_stride: tl.tensor,
    k_size: tl.tensor,
    n0: tl.tensor,
    n1: tl.tensor,
    n2: tl.tensor,
    plane_stride: tl.tensor,
    module_stride: tl.tensor,
    width: tl.tensor,
    has_bias: tl.constexpr,
    group: tl.constexpr,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bn: tl.constexpr,
    bk: tl.constexpr,
    align: tl.constexpr,
    terms: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """y[row] = x[row]·Wᵀ (+ bias) + scaling · S_j · Bᵀ_j, for every row of the batch, base rows included.

    Grid: (tiles · blocks), tiles of the table that also covers base rows. The term is added after the loop over K:
    before it, its operands would occupy the registers of the accumulator's loop.

    Args:
        y: [T, n0 + n1 + n2], written.
        weight: [n0 + n1 + n2, k_size], contiguous; the modules' weights one below the other.
        bias: [n0 + n1 + n2]; not read unless `has_bias`.
        group: tiles that share a block of the weight while it is in the second-level cache.
    """
    # Blocks of a group of tiles run together, so that each part of W is fetched once per group.
    blocks = tl.cdiv(n0, bn) + tl.cdiv(n1, bn) + tl.cdiv(n2, bn)
    pid = tl.program_id(0)
    first = pid // (group * blocks) * group
    group_size = tl.minimum(tiles - first, group)
    tile = first + pid % (group * blocks) % group_size
    j, block = module_of_block(pid % (group * blocks) // group_size, n0, n1, bn)
    start = tl.load(tile_ptr + tile)
    length = tl.load(tile_ptr + tile + 1) - start
    if length > 0:
        slot = tl.load(tile_slot + tile)
        m = tl.arange(0, bm)
        live = m < length
        position = start + m
        rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
        n_size = pick(j, n0, n1, n2)
        column = pick(j, 0, n0, n0 + n1)
        n = block * bn + tl.arange(0, bn)
        inside = n < n_size
        acc = tl.zeros([bm, bn], tl.float32)
        x_rows = x + rows[:, None] * x_stride
        w_rows = weight + (column + n).to(tl.int64)[:, None] * k_size
        for k_at in range(0, k_size, bk):
            k = k_at + tl.arange(0, bk)
            a = tl.load(x_rows + k[None, :], mask=live[:, None] & (k < k_size)[None, :], other=0.0)
            b = tl.load(w_rows + k[None, :], mask=inside[:, None] & (k < k_size)[None, :], other=0.0)
            acc = dot_low(a, tl.trans(b), acc, cast)
        if has_bias:
            acc += tl.load(bias + column + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if slot >= 0:
            entry = (row + j) * slots + slot
            rank = tl.load(ranks + entry)
            scale = tl.load(scaling + entry)
            low = arena + tl.multiple_of(tl.load(offsets + entry), align)
            for r_begin in tl.range(0, rank, rb, num_stages=1):  # leaves the shared memory to the loop above
                r = r_begin + tl.arange(0, rb)
                b = tl.load(
                    low + r[:, None] * n_size + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0
                )
                s = sum_planes(planes + j * module_stride, plane_stride, width, position, live, r, rank, splits)
                acc = dot_planes(s * scale, b, acc, terms, cast)
        at = y + column + rows[:, None] * y_stride + n[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])
