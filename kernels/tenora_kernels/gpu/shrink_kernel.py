"""Shrink: S = x·Aᵀ, and dS = dY·B in the backward pass, as partial sums in planes.

Programs own what they write: no sum goes through an atomic, and equal arguments give equal bits. Which other adapters
are in the batch changes no bit of a row.

A row of a small batch that is alone with its adapter is a product of vectors: on the tensor cores fifteen rows of
nothing would be computed beside it.
"""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import dot_low, jit, launch_dependents, pick, wait_for_launch_before


@jit()
def _shrink_tile(
    x: tl.tensor,
    x_stride: tl.tensor,
    w: tl.tensor,
    k_size: tl.tensor,
    planes: tl.tensor,
    width: tl.tensor,
    perm: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    rank: tl.tensor,
    k_begin: tl.tensor,
    k_end: tl.tensor,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bk: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """One plane of S for one tile: x[rows, k_begin:k_end] · w[rank, k_begin:k_end]ᵀ, w of row stride k_size."""
    m = tl.arange(0, bm)
    live = m < length
    position = start + m
    rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
    x_rows = x + rows[:, None] * x_stride
    for r_begin in range(0, rank, rb):
        r = r_begin + tl.arange(0, rb)
        acc = tl.zeros([bm, rb], tl.float32)
        for k_at in range(k_begin, k_end, bk):
            k = k_at + tl.arange(0, bk)
            inside = k < k_end
            a = tl.load(x_rows + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            b = tl.load(w + r[:, None] * k_size + k[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            acc = dot_low(a, tl.trans(b), acc, cast)
        mask = live[:, None] & (r < rank)[None, :]
        tl.store(planes + position[:, None] * width + r[None, :], acc, mask=mask)


@jit()
def _shrink_row(
    x: tl.tensor,
    x_stride: tl.tensor,
    w: tl.tensor,
    k_size: tl.tensor,
    planes: tl.tensor,
    width: tl.tensor,
    perm: tl.tensor,
    start: tl.tensor,
    rank: tl.tensor,
    k_begin: tl.tensor,
    k_end: tl.tensor,
    rb: tl.constexpr,
    single_row_inputs: tl.constexpr,
) -> None:
    """`_shrink_tile` for one row, some inputs at a time: products of vectors, each weight read and used once."""
    source = x + tl.load(perm + start).to(tl.int64) * x_stride
    for r_begin in range(0, rank, rb):
        r = r_begin + tl.arange(0, rb)
        acc = tl.zeros([rb, single_row_inputs], tl.float32)
        for k_at in range(k_begin, k_end, single_row_inputs):
            k = k_at + tl.arange(0, single_row_inputs)
            inside = k < k_end
            b = tl.load(w + r[:, None] * k_size + k[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
            a = tl.load(source + k, mask=inside, other=0.0)
            acc += b.to(tl.float32) * a.to(tl.float32)[None, :]
        tl.store(planes + start * width + r, tl.sum(acc, axis=1), mask=r < rank)


@jit()
def _split_range(
    k_size: tl.tensor, split: tl.tensor, splits: tl.constexpr, bk: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """[begin, end) of a split: equal numbers of blocks of bk. Depends on k_size only, so that bits do too."""
    chunk = tl.cdiv(tl.cdiv(k_size, bk), splits) * bk
    begin = split * chunk
    return begin, tl.minimum(begin + chunk, k_size)


@jit("row", "slots", "plane_stride")
def shrink(
    x: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    perm: tl.tensor,
    tile_ptr: tl.tensor,
    tile_slot: tl.tensor,
    ranks: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    x_stride: tl.tensor,
    c0: tl.tensor,
    c1: tl.tensor,
    c2: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    plane_stride: tl.tensor,
    module_stride: tl.tensor,
    width: tl.tensor,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bk: tl.constexpr,
    single_row_rb: tl.constexpr,
    single_row_inputs: tl.constexpr,
    align: tl.constexpr,
    cast: tl.constexpr,
    overlap: tl.constexpr,
) -> None:
    """planes[split, j, position] = x[row, c_j : c_j + k_j] · W_jᵀ, over the split's share of k_j.

    Grid: (tiles, modules · splits). W_j is A_j forward (c = 0, k = in), Bᵀ_j backward (c, k = module j's slice of y).

    Args:
        single_row_rb: ranks of one pass for a tile of one row.
        single_row_inputs: inputs at a time for it; 0: such a tile is like any other.
        overlap: whether this launch may begin while the one before it ends, and the next one while this one runs.
    """
    if overlap:
        wait_for_launch_before()
        launch_dependents()
    tile = tl.program_id(0)
    start = tl.load(tile_ptr + tile)
    length = tl.load(tile_ptr + tile + 1) - start
    slot = tl.load(tile_slot + tile)
    if slot >= 0:
        j = tl.program_id(1) // splits
        split = tl.program_id(1) % splits
        entry = (row + j) * slots + slot
        rank = tl.load(ranks + entry)
        k_size = pick(j, k0, k1, k2)
        k_begin, k_end = _split_range(k_size, split, splits, bk)
        w = arena + tl.multiple_of(tl.load(offsets + entry), align)
        target = planes + split * plane_stride + j * module_stride
        source = x + pick(j, c0, c1, c2)
        single_row = False
        if single_row_inputs > 0:
            single_row = length == 1
            if single_row:
                _shrink_row(
                    source,
                    x_stride,
                    w,
                    k_size,
                    target,
                    width,
                    perm,
                    start,
                    rank,
                    k_begin,
                    k_end,
                    single_row_rb,
                    single_row_inputs,
                )
        if not single_row:
            _shrink_tile(
                source, x_stride, w, k_size, target, width, perm, start, length, rank, k_begin, k_end, bm, rb, bk, cast
            )
