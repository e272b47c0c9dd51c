"""The gradient of the low-rank op: the same two tiles, in two phases that need no atomics on what they write.

With S = c·x·Aᵀ and dS = c·dY·B: first, block by block of rows, S, dS and dX += dS·A; then, column by column of the
weights, dA += dSᵀ·X and dBᵀ += Sᵀ·dY, which are expands whose ranks and rows have changed places.
"""

from __future__ import annotations

from tenora_kernels.cpu.lowrank.lora_blocks import (
    BF16,
    F32,
    I64,
    SEGMENTS,
    SITE,
    TABLES,
    X_STRIDE,
    Y_STRIDE,
    X,
    Y,
    expand_rows,
    find_block,
    shrink_rows,
    weights_of,
)
from tenora_kernels.cpu.lowrank.lora_tile import fetch_add
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.values import peek, size_of
from tenora_kernels.cpu.runtime.vectors import LANES

# Y and Y_STRIDE of the record are those of dY here; these come on top.
DX, DX_STRIDE, GRAD, SCRATCH, SPANS, IDENTITY = 18, 19, 20, 21, 22, 23

COLUMNS = 24 * LANES
"""Columns of a task of the second phase: with the rows of a step they fill half of the first cache."""

STEP = 24
"""Rows that the second phase sums before it adds them to the gradient."""


@compiled()
def _shrunk(record, j, position):
    """Where S and dS of slice j lie for the rows of a segment from `position` of perm on."""
    segments, spans = peek(record, SEGMENTS, I64), peek(record, SPANS, I64)
    rows = peek(peek(segments, 1, I64), peek(segments, 3, I64), I64)
    before = 0
    for other in range(j):
        before += peek(spans, other, I64)
    span = peek(spans, j, I64)
    s = peek(record, SCRATCH, I64) + 4 * (2 * rows * before + position * span)
    return s, s + 4 * rows * span


@job()
def input_job(control, record, sample):
    """The first phase: claim blocks of rows until none is left."""
    site, segments, tables = peek(record, SITE, I64), peek(record, SEGMENTS, I64), peek(record, TABLES, I64)
    depth, slices = peek(site, 1, I64), peek(site, 2, I64)
    dx, grad = peek(record, DX, I64), peek(record, GRAD, I64)
    segment, before = 0, 0
    while True:
        segment, before, first, rows = find_block(record, fetch_add(record), segment, before)
        if rows == 0:
            return
        slot, index = peek(peek(segments, 2, I64), segment, I64), peek(segments, 0, I64) + 8 * first
        start_of_segment = peek(peek(segments, 1, I64), segment, I64)
        for j in range(slices):
            row = peek(site, 0, I64) + j
            rank, size, a, b = weights_of(record, row, slot)
            if rank == 0:
                continue
            scale = peek(peek(tables, 1, I64), row * peek(tables, 5, I64) + slot, F32)
            start = peek(site, 3 + 2 * j, I64)
            width = peek(site, 4 + 2 * j, I64) - start
            s, ds = _shrunk(record, j, start_of_segment)
            inside = 4 * rank * (first - start_of_segment)
            s += inside
            ds += inside
            x, dy = peek(record, X, I64), peek(record, Y, I64) + start * size_of(sample)
            x_stride, dy_stride, dx_stride = (
                peek(record, X_STRIDE, I64), peek(record, Y_STRIDE, I64), peek(record, DX_STRIDE, I64)
            )  # fmt: skip
            if size == 4:
                shrink_rows(dy, dy_stride, index, rows, b, width, rank, scale, ds, 0, 0, sample, F32)
                if dx != 0:
                    expand_rows(ds, 4 * rank, 4, rows, rank, a, 4 * depth, depth, dx, dx_stride, index, 0, 0, F32, F32)
                if grad != 0:
                    shrink_rows(x, x_stride, index, rows, a, depth, rank, scale, s, 0, 0, sample, F32)
            else:
                shrink_rows(dy, dy_stride, index, rows, b, width, rank, scale, ds, 0, 0, sample, BF16)
                if dx != 0:
                    expand_rows(ds, 4 * rank, 4, rows, rank, a, 2 * depth, depth, dx, dx_stride, index, 0, 0, F32, BF16)
                if grad != 0:
                    shrink_rows(x, x_stride, index, rows, a, depth, rank, scale, s, 0, 0, sample, BF16)


@compiled()
def _run(index, rows):
    """How many of `rows` row numbers follow one another."""
    first, n = peek(index, 0, I64), 1
    while n < rows and peek(index, n, I64) == first + n:
        n += 1
    return n


@compiled()
def _sum_rows(record, segment, coefficients, rank, values, stride, columns, out, out_stride, sample):
    """`out[rank, columns] += coefficientsᵀ · values` over the rows of a segment."""
    segments = peek(record, SEGMENTS, I64)
    at, last = peek(peek(segments, 1, I64), segment, I64), peek(peek(segments, 1, I64), segment + 1, I64)
    identity = peek(record, IDENTITY, I64)
    while at < last:
        index = peek(segments, 0, I64) + 8 * at
        n = _run(index, min(STEP, last - at))
        rows = values + peek(index, 0, I64) * stride
        expand_rows(coefficients, 4, 4 * rank, rank, n, rows, stride, columns, out, out_stride, identity, 0, 0,
                    F32, sample)  # fmt: skip
        coefficients += 4 * rank * n
        at += n


@job()
def weight_job(control, record, sample):
    """The second phase: claim columns of dA and dBᵀ until none are left."""
    site, segments, tables = peek(record, SITE, I64), peek(record, SEGMENTS, I64), peek(record, TABLES, I64)
    depth, slices, slots = peek(site, 1, I64), peek(site, 2, I64), peek(tables, 5, I64)
    grad = peek(record, GRAD, I64)
    task, before = fetch_add(record), 0
    for segment in range(peek(segments, 3, I64)):
        slot, position = peek(peek(segments, 2, I64), segment, I64), peek(peek(segments, 1, I64), segment, I64)
        for j in range(slices):
            row, start = peek(site, 0, I64) + j, peek(site, 3 + 2 * j, I64)
            rank, _, _, _ = weights_of(record, row, slot)
            if rank == 0:
                continue
            s, ds = _shrunk(record, j, position)
            for side in range(2):
                columns = depth if side == 0 else peek(site, 4 + 2 * j, I64) - start
                count = (columns + COLUMNS - 1) // COLUMNS
                while task < before + count:
                    first = (task - before) * COLUMNS
                    n = min(COLUMNS, columns - first)
                    out = grad + 4 * (peek(peek(tables, 2 + side, I64), row * slots + slot, I64) + first)
                    if side == 0:
                        values, stride = peek(record, X, I64), peek(record, X_STRIDE, I64)
                        coefficients = ds
                    else:
                        values = peek(record, Y, I64) + start * size_of(sample)
                        stride, coefficients = peek(record, Y_STRIDE, I64), s
                    values += first * size_of(sample)
                    _sum_rows(record, segment, coefficients, rank, values, stride, n, out, 4 * columns, sample)
                    task = fetch_add(record)
                before += count
