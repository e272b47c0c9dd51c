"""Expand: y += S·Bᵀ, and dX += dS·A in the backward pass.

In the forward pass this launch begins while `shrink` runs (programmatic dependent launch), and has its weights under
way when the sums are there. Both in one launch, its programs waiting on counters, was slower.
"""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import (
    dot_planes,
    jit,
    module_of_block,
    pick,
    sum_planes,
    sum_planes_of_row,
    wait_for_launch_before,
)

MAX_PLANES = tl.constexpr(16)
"""A power of two not below `configs.splits_of` of anything."""


@jit()
def _expand_row(
    y: tl.tensor,
    y_stride: tl.tensor,
    w: tl.tensor,
    n_size: tl.tensor,
    scale: tl.tensor,
    planes: tl.tensor,
    plane_stride: tl.tensor,
    width: tl.tensor,
    perm: tl.tensor,
    start: tl.tensor,
    rank: tl.tensor,
    n: tl.tensor,
    splits: tl.constexpr,
    rb: tl.constexpr,
    overlap: tl.constexpr,
) -> None:
    """Columns n of y for a tile of one row: products of vectors, each weight read and used once."""
    target = y + tl.load(perm + start).to(tl.int64) * y_stride + n
    source = planes + start * width
    inside = n < n_size
    r = tl.arange(0, rb)
    b = tl.load(w + r[:, None] * n_size + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
    if overlap:  # with the first of the weights on their way
        wait_for_launch_before()
    s = sum_planes_of_row(source, plane_stride, r, rank, splits, MAX_PLANES)
    acc = tl.sum(b.to(tl.float32) * s[:, None], axis=0)
    for r_begin in range(rb, rank, rb):
        more = r_begin + r
        b = tl.load(w + more[:, None] * n_size + n[None, :], mask=(more < rank)[:, None] & inside[None, :], other=0.0)
        s = sum_planes_of_row(source, plane_stride, more, rank, splits, MAX_PLANES)
        acc += tl.sum(b.to(tl.float32) * s[:, None], axis=0)
    before = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (before + scale * acc).to(y.dtype.element_ty), mask=inside)


@jit()
def _expand_tile(
    y: tl.tensor,
    y_stride: tl.tensor,
    w: tl.tensor,
    n_size: tl.tensor,
    scale: tl.tensor,
    planes: tl.tensor,
    plane_stride: tl.tensor,
    width: tl.tensor,
    perm: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    rank: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    multi_pass: tl.constexpr,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bn: tl.constexpr,
    terms: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """`count` blocks of bn columns of y from block `first` on, for the rows of a tile.

    One loop over blocks and ranks, so that the compiler reads ahead: the next blocks of Bᵀ and y are on their way
    while this one is added.
    """
    position = start + tl.arange(0, bm)
    live = position < end
    rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
    y_rows = y + rows[:, None] * y_stride
    r = tl.arange(0, rb)
    s = sum_planes(planes, plane_stride, width, position, live, r, rank, splits) * scale
    acc = tl.zeros([bm, bn], tl.float32)
    passes = 1
    if multi_pass:
        passes = tl.cdiv(rank, rb)
    for item in range(count * passes):
        n = (first + item // passes) * bn + tl.arange(0, bn)
        inside = n < n_size
        mask = live[:, None] & inside[None, :]
        if multi_pass:
            r = item % passes * rb + tl.arange(0, rb)
            s = sum_planes(planes, plane_stride, width, position, live, r, rank, splits) * scale
        b = tl.load(w + r[:, None] * n_size + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
        begun = tl.load(y_rows + n[None, :], mask=mask & (item % passes == 0), other=0.0).to(tl.float32)
        acc = begun if not multi_pass else tl.where(item % passes == 0, begun, acc)
        acc = dot_planes(s, b, acc, terms, cast)
        done = mask & (item % passes == passes - 1)
        tl.store(y_rows + n[None, :], acc.to(y.dtype.element_ty), mask=done)


@jit("row", "slots", "plane_stride", "bound", "per_program")
def expand(
    y: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    perm: tl.tensor,
    tile_ptr: tl.tensor,
    tile_slot: tl.tensor,
    tile_count: tl.tensor,
    ranks: tl.tensor,
    scaling: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    y_stride: tl.tensor,
    c0: tl.tensor,
    c1: tl.tensor,
    c2: tl.tensor,
    n0: tl.tensor,
    n1: tl.tensor,
    n2: tl.tensor,
    plane_stride: tl.tensor,
    module_stride: tl.tensor,
    width: tl.tensor,
    bound: tl.tensor,
    per_program: tl.tensor,
    multi_pass: tl.constexpr,
    parts: tl.constexpr,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bn: tl.constexpr,
    single_row_rb: tl.constexpr,
    columns_per_program: tl.constexpr,
    align: tl.constexpr,
    terms: tl.constexpr,
    cast: tl.constexpr,
    overlap: tl.constexpr,
) -> None:
    """y[row, c_j + n] += scaling · S_j · Bᵀ_j[:, n], S_j summed over the planes.

    Grid: (chunks of per_program blocks of bn columns, none spanning two modules; tiles · parts). Of a small batch
    there may be more programs than tiles; those without one share the blocks of the others' tiles. A row that is alone
    is not shared: there are many such rows, or little to do.

    Args:
        tile_count: int32 [1], number of tiles; not read if columns_per_program is 0.
        bound: most tiles that there can be.
        per_program: blocks of one program; columns_per_program / bn where columns_per_program is not 0.
        multi_pass: whether ranks may exceed rb; if not, S is read once for all blocks.
        parts: of a tile, bm rows each.
        single_row_rb: ranks of one pass for a tile of one row.
        columns_per_program: columns of a program for it; 0: such a tile is like any other.
        overlap: whether the launch before has let this one begin early. Up to the wait no planes and no y are read.
            Every program waits: a launch that ended before could be overtaken by what follows it.
    """
    tile = tl.program_id(1) // parts
    start = tl.load(tile_ptr + tile, mask=tile < bound, other=0)
    end = tl.load(tile_ptr + tile + 1, mask=tile < bound, other=0)
    slot = tl.load(tile_slot + tile, mask=tile < bound, other=-1)
    j, chunk = module_of_block(tl.program_id(0), n0, n1, bn * per_program)
    n_size = pick(j, n0, n1, n2)
    blocks = per_program
    helper = 0
    if columns_per_program > 0:
        tiles = tl.maximum(tl.load(tile_count), 1)
        helper = tile // tiles
        if helper > 0:  # its own tile does not exist
            tile = tile % tiles
            start = tl.load(tile_ptr + tile)
            end = tl.load(tile_ptr + tile + 1)
            slot = tl.load(tile_slot + tile)
        blocks = tl.cdiv(per_program, tl.minimum(tl.num_programs(1) // tiles, per_program))
    start += tl.program_id(1) % parts * bm
    entry = (row + j) * slots + tl.maximum(slot, 0)
    rank = tl.load(ranks + entry)
    scale = tl.load(scaling + entry)
    w = arena + tl.multiple_of(tl.load(offsets + entry), align)
    source = planes + j * module_stride
    target = y + pick(j, c0, c1, c2)
    single_row = False
    if columns_per_program > 0:
        single_row = (end - start == 1) & (rank > 0) & (helper == 0)
        if single_row:
            n = chunk * columns_per_program + tl.arange(0, columns_per_program)
            _expand_row(
                target, y_stride, w, n_size, scale, source, plane_stride, width, perm, start, rank, n, splits,
                single_row_rb, overlap,
            )  # fmt: skip
    if not single_row:
        if overlap:
            wait_for_launch_before()
        shared = (slot >= 0) & (rank > 0) & (start < end)
        if columns_per_program > 0:
            shared = shared & (end - start > 1)
        if shared:
            first = chunk * per_program + helper * blocks
            last = tl.minimum(tl.minimum(first + blocks, (chunk + 1) * per_program), tl.cdiv(n_size, bn))
            _expand_tile(
                target, y_stride, w, n_size, scale, source, plane_stride, width, perm, start, end, rank, first,
                last - first, multi_pass, splits, bm, rb, bn, terms, cast,
            )  # fmt: skip


@jit("row", "slots", "modules", "plane_stride")
def expand_joint(
    target: tl.tensor,
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
    modules: tl.tensor,
    stride: tl.tensor,
    n_size: tl.tensor,
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
    """dX[row, n] += Σ_j scaling · dS_j · A_j[:, n]: every module adds to the same n_size columns.

    Grid: (blocks of bn columns, tiles).
    """
    tile = tl.program_id(1)
    start = tl.load(tile_ptr + tile)
    length = tl.load(tile_ptr + tile + 1) - start
    slot = tl.load(tile_slot + tile)
    if slot >= 0:
        m = tl.arange(0, bm)
        live = m < length
        position = start + m
        rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
        n = tl.program_id(0) * bn + tl.arange(0, bn)
        mask = live[:, None] & (n < n_size)[None, :]
        at = target + rows[:, None] * stride + n[None, :]
        acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        for j in range(modules):
            entry = (row + j) * slots + slot
            rank = tl.load(ranks + entry)
            scale = tl.load(scaling + entry)
            w = arena + tl.multiple_of(tl.load(offsets + entry), align)
            for r_begin in tl.range(0, rank, rb, num_stages=1):  # mostly one pass: buffers would lie idle
                r = r_begin + tl.arange(0, rb)
                b = tl.load(
                    w + r[:, None] * n_size + n[None, :], mask=(r < rank)[:, None] & (n < n_size)[None, :], other=0.0
                )
                s = sum_planes(planes + j * module_stride, plane_stride, width, position, live, r, rank, splits)
                acc = dot_planes(s * scale, b, acc, terms, cast)
        tl.store(at, acc.to(target.dtype.element_ty), mask=mask)
