"""The low-rank op on blocks of rows: what one thread does, compiled for one element type of x and y."""

from __future__ import annotations

import numpy as np

from tenora_kernels.cpu.lowrank.lora_tile import CACHE_LINE, MAX_ROWS, STACK_FLOATS, expand, fetch_add, shrink, stack
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.values import peek, poke, size_of
from tenora_kernels.cpu.runtime.vectors import LANES

MAX_BLOCK = 24
"""Rows that pass over A and Bᵀ together: they turn a read from memory into reads from the first cache."""

MAX_LINES = 4
"""Cache lines fetched ahead per step at most; a core has some twenty requests under way."""

SERIAL = 150_000
"""Weights times rows (up to eight rows count as one) below which a second thread costs more than it saves."""

# A call's record, int64; the counter of claimed tasks has a cache line for itself.
COUNTER, Y, Y_STRIDE, X, X_STRIDE, ARENA, WIDE, SITE, TABLES, SEGMENTS, BLOCK = 0, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17

RECORD_SIZE = 24
_scratch = stack(STACK_FLOATS // 2)

I64, I32, F32, U8, BF16 = np.int64(0), np.int32(0), np.float32(0), np.uint8(0), np.uint16(0)


@compiled()
def _lines(size, steps):
    """Cache lines to fetch with each of `steps` steps, so that `size` bytes are there at the end."""
    return min(MAX_LINES, (size + CACHE_LINE * steps - 1) // (CACHE_LINE * max(steps, 1)))


@compiled()
def tile_rows(rows):
    """Rows of the next tile: three, but two and two rather than three and one, which has too few chains."""
    if rows >= MAX_ROWS and rows != MAX_ROWS + 1:
        return MAX_ROWS
    return min(rows, 2)


@compiled()
def shrink_rows(x, x_stride, index, rows, a, depth, rank, scale, out, ahead, ahead_size, x_sample, a_sample):
    """`out[rows, rank] = scale · x[index] · Aᵀ`; addresses, strides in bytes.

    A single row fetches the `ahead_size` bytes at `ahead` meanwhile.
    """
    whole = depth // LANES
    lines = _lines(ahead_size, ((rank >> 3) + ((rank >> 2) & 1) + ((rank >> 1) & 1) + (rank & 1)) * whole)
    j = 0
    while j < rank:
        left = rank - j
        ranks = 1
        if left >= 8 and rows == 1:
            ranks = 8
        elif left >= 4:
            ranks = 4
        elif left >= 2:
            ranks = 2
        a_at = a + j * depth * size_of(a_sample)
        i = 0
        while i < rows:
            n = tile_rows(rows - i)
            at = out + 4 * (i * rank + j)
            shrink(n, ranks, x, x_stride, index + 8 * i, a_at, depth, scale, at, 4 * rank, ahead, lines,
                   x_sample, a_sample)  # fmt: skip
            i += n
        j += ranks
        ahead += whole * lines * CACHE_LINE


@compiled()
def expand_rows(
    s, s_row, s_step, rows, depth, b, b_stride, width, y, y_stride, index, ahead, ahead_size, y_sample, b_sample
):
    """`y[index] += s · b` for a [rows, depth] s and a [depth, width] b; addresses, strides in bytes.

    A single row fetches the `ahead_size` bytes at `ahead` meanwhile.
    """
    lines = _lines(ahead_size, ((width + 8 * LANES - 1) // (8 * LANES)) * depth)
    c = 0
    while c < width:
        left = width - c
        vectors = 0
        if left >= 8 * LANES and rows == 1:
            vectors = 8
        elif left >= 4 * LANES:
            vectors = 4
        elif left >= LANES:
            vectors = 1
        b_at, y_at = b + c * size_of(b_sample), y + c * size_of(y_sample)
        i = 0
        while i < rows:
            n = tile_rows(rows - i)
            s_at = s + i * s_row
            expand(n, vectors, s_at, s_row, s_step, depth, b_at, b_stride, y_at, y_stride, index + 8 * i, ahead, lines,
                   y_sample, b_sample)  # fmt: skip
            i += n
        c += vectors * LANES if vectors else 1
        ahead += depth * lines * CACHE_LINE


@compiled()
def weights_of(record, row, slot):
    """Rank, bytes of an element, and the addresses of A and Bᵀ of one module in one slot."""
    tables, arena = peek(record, TABLES, I64), peek(record, ARENA, I64)
    at = row * peek(tables, 5, I64) + slot
    rank = int(peek(peek(tables, 0, I64), at, I32))
    wide = peek(record, WIDE, I64) == 1 and peek(peek(tables, 4, I64), slot, U8) == 0
    size = 4 if wide else 2
    a, b = peek(peek(tables, 2, I64), at, I64), peek(peek(tables, 3, I64), at, I64)
    return rank, size, arena + size * a, arena + size * b


@compiled()
def _adapt(record, task, following, scratch, sample):
    """Add one module of one slot to a block of its rows; meanwhile fetch what the task behind it reads first."""
    row, slot, index, rows, start, width = task
    rank, size, a, b = weights_of(record, row, slot)
    if rank == 0:
        return
    tables, depth = peek(record, TABLES, I64), peek(peek(record, SITE, I64), 1, I64)
    scale = peek(peek(tables, 1, I64), row * peek(tables, 5, I64) + slot, F32)
    x, x_stride = peek(record, X, I64), peek(record, X_STRIDE, I64)
    y, y_stride = peek(record, Y, I64) + start * size_of(sample), peek(record, Y_STRIDE, I64)
    b_size = rank * width * size
    next_rank, next_size, ahead, _ = weights_of(record, following[0], following[1])
    ahead_size = 0 if following[3] == 0 else next_rank * depth * next_size
    # What does not fit the scratch goes piece by piece: rows, and (beyond any adapter known) ranks.
    part = min(rank, STACK_FLOATS)
    most = STACK_FLOATS // part
    for at in range(0, rank, part):
        ranks = min(part, rank - at)
        a_at, b_at = a + at * depth * size, b + at * width * size
        for i in range(0, rows, most):
            n, here = min(rows - i, most), index + 8 * i
            if size == 4:
                shrink_rows(x, x_stride, here, n, a_at, depth, ranks, scale, scratch, b, b_size, sample, F32)
                expand_rows(scratch, 4 * ranks, 4, n, ranks, b_at, 4 * width, width, y, y_stride, here,
                            ahead, ahead_size, sample, F32)  # fmt: skip
            else:
                shrink_rows(x, x_stride, here, n, a_at, depth, ranks, scale, scratch, b, b_size, sample, BF16)
                expand_rows(scratch, 4 * ranks, 4, n, ranks, b_at, 2 * width, width, y, y_stride, here,
                            ahead, ahead_size, sample, BF16)  # fmt: skip


@compiled()
def find_block(record, unit, segment, before):
    """A block of rows: its segment, the blocks before that segment, its place in perm and its rows, 0 past the last.

    The search starts at `segment`, which has `before` blocks before it.
    """
    segments, block = peek(record, SEGMENTS, I64), peek(record, BLOCK, I64)
    seg_ptr, count = peek(segments, 1, I64), peek(segments, 3, I64)
    while segment < count:
        first, last = peek(seg_ptr, segment, I64), peek(seg_ptr, segment + 1, I64)
        blocks = (last - first + block - 1) // block
        if unit < before + blocks:
            first += (unit - before) * block
            return segment, before, first, min(block, last - first)
        before += blocks
        segment += 1
    return segment, before, 0, 0


@compiled()
def _find(record, task, segment, before):
    """What a task is: module and slot, the address of its row numbers and how many they are (0: there is no such task),
    first column and columns; and where the search of a later task starts."""
    site, segments = peek(record, SITE, I64), peek(record, SEGMENTS, I64)
    slices = peek(site, 2, I64)
    segment, before, first, rows = find_block(record, task // slices, segment, before)
    if rows == 0:
        return (peek(site, 0, I64), 0, 0, 0, 0, 0), segment, before
    j = task % slices
    start, stop = peek(site, 3 + 2 * j, I64), peek(site, 4 + 2 * j, I64)
    slot, index = peek(peek(segments, 2, I64), segment, I64), peek(segments, 0, I64) + 8 * first
    return (peek(site, 0, I64) + j, slot, index, rows, start, stop - start), segment, before


@job()
def forward_job(control, record, sample):
    """A job of a `Team`, or a call of its own. Claim tasks from the record's own counter until none is left.

    A task is a block of one segment's rows and a slice.
    """
    scratch = _scratch()
    task, segment, before = _find(record, fetch_add(record), 0, 0)
    while task[3] > 0:
        following, segment, before = _find(record, fetch_add(record), segment, before)
        _adapt(record, task, following, scratch, sample)
        task = following


@compiled()
def _work(site, tables, segments):
    """Weights of all tasks, each as often as it is multiplied with eight rows."""
    first_row, depth, slices = peek(site, 0, I64), peek(site, 1, I64), peek(site, 2, I64)
    ranks, slots = peek(tables, 0, I64), peek(tables, 5, I64)
    total = 0
    for segment in range(peek(segments, 3, I64)):
        slot = peek(peek(segments, 2, I64), segment, I64)
        seg_ptr = peek(segments, 1, I64)
        rows = peek(seg_ptr, segment + 1, I64) - peek(seg_ptr, segment, I64)
        weights = 0
        for j in range(slices):
            width = peek(site, 4 + 2 * j, I64) - peek(site, 3 + 2 * j, I64)
            weights += int(peek(ranks, (first_row + j) * slots + slot, I32)) * (depth + width)
        total += weights * ((rows + 7) // 8)
    return total


@job()
def plan_forward(record, threads):
    """Cut a filled record's rows into blocks; tells whether several threads are worth waking."""
    site, tables, segments = peek(record, SITE, I64), peek(record, TABLES, I64), peek(record, SEGMENTS, I64)
    slices, count = peek(site, 2, I64), peek(segments, 3, I64)
    rows = peek(peek(segments, 1, I64), count, I64)
    # Small enough that every thread gets a few tasks, a whole number of tiles.
    blocks = (4 * threads + slices - 1) // slices
    tiles = ((rows + blocks - 1) // blocks + MAX_ROWS - 1) // MAX_ROWS
    block = min(MAX_BLOCK, max(1, tiles) * MAX_ROWS)
    poke(record, BLOCK, block)
    return threads > 1 and (count * slices > 1 or rows > block) and _work(site, tables, segments) > SERIAL
