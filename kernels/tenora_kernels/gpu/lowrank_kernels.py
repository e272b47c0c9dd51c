"""Shrink, expand, and both in one launch. The same kernels give dS = dY·B and dX += dS·A in the backward pass.

Programs own what they write: no sum goes through an atomic, and equal arguments give equal bits. A row's result does
not depend on which other rows are in the batch.
"""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import dot_low, dot_planes, jit, module_of_block, pick, sum_planes


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
    align: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """planes[split, j, position] = x[row, c_j : c_j + k_j] · W_jᵀ, over the split's share of k_j.

    Grid: (tiles, modules · splits). W_j is A_j forward (c = 0, k = in), Bᵀ_j backward (c, k = module j's slice of y).
    """
    tile = tl.program_id(0)
    start = tl.load(tile_ptr + tile)
    length = tl.load(tile_ptr + tile + 1) - start
    slot = tl.load(tile_slot + tile, mask=length > 0, other=-1)
    if (length > 0) & (slot >= 0):
        j = tl.program_id(1) // splits
        split = tl.program_id(1) % splits
        entry = (row + j) * slots + slot
        rank = tl.load(ranks + entry)
        k_size = pick(j, k0, k1, k2)
        k_begin, k_end = _split_range(k_size, split, splits, bk)
        w = arena + tl.multiple_of(tl.load(offsets + entry), align)
        target = planes + split * plane_stride + j * module_stride
        source = x + pick(j, c0, c1, c2)
        _shrink_tile(
            source, x_stride, w, k_size, target, width, perm, start, length, rank, k_begin, k_end, bm, rb, bk, cast
        )


@jit("row", "slots", "modules", "plane_stride")
def expand(
    y: tl.tensor,
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
    joint: tl.constexpr,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bn: tl.constexpr,
    align: tl.constexpr,
    terms: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """y[row, c_j + n] += scaling · S_j · W_j[:, n], S_j summed over the planes.

    Grid: (blocks of bn columns over all modules, tiles). W_j is Bᵀ_j forward. `joint` (backward, W_j = A_j): every
    module adds to the same n0 columns of y from c0 on, and the grid has the blocks of the first only.
    """
    tile = tl.program_id(1)
    start = tl.load(tile_ptr + tile)
    length = tl.load(tile_ptr + tile + 1) - start
    slot = tl.load(tile_slot + tile, mask=length > 0, other=-1)
    if (length > 0) & (slot >= 0):
        if joint:
            first = 0
            last = modules
            block = tl.program_id(0)
            n_size = n0
            column = c0
            rank_here = 1
        else:
            first, block = module_of_block(tl.program_id(0), n0, n1, bn)
            last = first + 1
            n_size = pick(first, n0, n1, n2)
            column = pick(first, c0, c1, c2)
            rank_here = tl.load(ranks + (row + first) * slots + slot)
        if rank_here > 0:
            m = tl.arange(0, bm)
            live = m < length
            position = start + m
            rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
            n = block * bn + tl.arange(0, bn)
            mask = live[:, None] & (n < n_size)[None, :]
            at = y + column + rows[:, None] * y_stride + n[None, :]
            acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            for j in range(first, last):
                entry = (row + j) * slots + slot
                rank = tl.load(ranks + entry)
                scale = tl.load(scaling + entry)
                w = arena + tl.multiple_of(tl.load(offsets + entry), align)
                for r_begin in tl.range(0, rank, rb, num_stages=1):  # mostly one pass: buffers would lie idle
                    r = r_begin + tl.arange(0, rb)
                    b = tl.load(
                        w + r[:, None] * n_size + n[None, :],
                        mask=(r < rank)[:, None] & (n < n_size)[None, :],
                        other=0.0,
                    )
                    s = sum_planes(planes + j * module_stride, plane_stride, width, position, live, r, rank, splits)
                    acc = dot_planes(s * scale, b, acc, terms, cast)
            tl.store(at, acc.to(y.dtype.element_ty), mask=mask)


@jit()
def _wait(ready: tl.tensor, wanted: tl.constexpr) -> None:
    """Until `wanted` programs have released the counter; what they wrote before is visible afterwards."""
    while tl.atomic_add(ready, 0, sem="acquire") < wanted:
        pass
    tl.debug_barrier()


@jit()
def _leave(ready: tl.tensor, left: tl.tensor, programs: tl.tensor) -> None:
    """The last of `programs` readers clears both counters, for the next launch on the stream."""
    if tl.atomic_add(left, 1, sem="acq_rel") == programs - 1:
        tl.store(left, 0)
        tl.store(ready, 0)


@jit("row", "slots", "modules", "tiles", "plane_stride")
def shrink_expand(
    y: tl.tensor,
    x: tl.tensor,
    arena: tl.tensor,
    planes: tl.tensor,
    counters: tl.tensor,
    perm: tl.tensor,
    tile_ptr: tl.tensor,
    tile_slot: tl.tensor,
    ranks: tl.tensor,
    scaling: tl.tensor,
    a_offsets: tl.tensor,
    b_offsets: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    modules: tl.tensor,
    tiles: tl.tensor,
    y_stride: tl.tensor,
    x_stride: tl.tensor,
    k_size: tl.tensor,
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
    bk: tl.constexpr,
    align: tl.constexpr,
    terms: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """`shrink` and `expand` of one projection group in one launch.

    Work items: tiles · modules · splits that shrink, then tiles · blocks that expand. A program takes every G-th item
    of a grid of G, so it finds its shrinks before its expands. A shrink writes its plane, releases the counter of its
    (tile, module) and waits for nobody; an expand loads y and its first block of Bᵀ, then waits for the counter. The
    caller guarantees that all programs are on the device at once.

    Args:
        counters: int32 [2, tiles · modules], zero between launches: planes written, and readers that are done.
    """
    shrinks = tiles * modules * splits
    # Tiles vary slowest: the planes of the first tiles are complete before those of the last are begun.
    per_tile = modules * splits
    blocks = tl.cdiv(n0, bn) + tl.cdiv(n1, bn) + tl.cdiv(n2, bn)
    for item in range(tl.program_id(0), shrinks + tiles * blocks, tl.num_programs(0)):
        is_shrink = item < shrinks
        tile = tl.where(is_shrink, item // per_tile, (item - shrinks) // blocks)
        start = tl.load(tile_ptr + tile)
        length = tl.load(tile_ptr + tile + 1) - start
        slot = tl.load(tile_slot + tile, mask=length > 0, other=0)
        j, block = module_of_block((item - shrinks) % blocks, n0, n1, bn)
        j = tl.where(is_shrink, item % per_tile // splits, j)
        entry = (row + j) * slots + slot
        rank = tl.load(ranks + entry, mask=length > 0, other=0)
        ready = counters + tile * modules + j
        source = planes + j * module_stride
        if rank > 0:
            if is_shrink:
                split = item % splits
                k_begin, k_end = _split_range(k_size, split, splits, bk)
                w = arena + tl.multiple_of(tl.load(a_offsets + entry), align)
                plane = source + split * plane_stride
                _shrink_tile(
                    x, x_stride, w, k_size, plane, width, perm, start, length, rank, k_begin, k_end, bm, rb, bk, cast
                )
                tl.debug_barrier()  # every thread's stores come before the one thread's release
                tl.atomic_add(ready, 1, sem="release")
            else:
                n_size = pick(j, n0, n1, n2)
                scale = tl.load(scaling + entry)
                w = arena + tl.multiple_of(tl.load(b_offsets + entry), align)
                m = tl.arange(0, bm)
                live = m < length
                position = start + m
                rows = tl.load(perm + position, mask=live, other=0).to(tl.int64)
                n = block * bn + tl.arange(0, bn)
                inside = n < n_size
                mask = live[:, None] & inside[None, :]
                at = y + pick(j, c0, c1, c2) + rows[:, None] * y_stride + n[None, :]
                acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                r = tl.arange(0, rb)
                b = tl.load(w + r[:, None] * n_size + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0)
                _wait(ready, splits)
                s = sum_planes(source, plane_stride, width, position, live, r, rank, splits)
                acc = dot_planes(s * scale, b, acc, terms, cast)
                for r_begin in tl.range(rb, rank, rb, num_stages=1):
                    r = r_begin + tl.arange(0, rb)
                    b = tl.load(
                        w + r[:, None] * n_size + n[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0
                    )
                    s = sum_planes(source, plane_stride, width, position, live, r, rank, splits)
                    acc = dot_planes(s * scale, b, acc, terms, cast)
                tl.store(at, acc.to(y.dtype.element_ty), mask=mask)
                _leave(ready, counters + (tiles + tile) * modules + j, tl.cdiv(n_size, bn))
