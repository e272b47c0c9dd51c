"""One adapter's share of one projection for a few rows of a batch: shrink and expand without leaving the cache."""

from __future__ import annotations

import numpy as np
from numba import float32, uint16

from tenora_kernels.cpu.product import (
    MAX_ROWS,
    PANEL,
    bytes_of,
    dots_for_one,
    dots_for_three,
    expand,
    expand_few,
    peek,
)  # fmt: skip
from tenora_kernels.cpu.values import compiled, store

__all__ = ["ITEM_ROWS", "low_rank"]

ITEM_ROWS = 24
"""Rows of one call at most: as many as read A and Bᵀ once from the cache; a multiple of 3 and of 6."""

# Places in the array `lora`: where the tables of `layout.LoraTables` lie. Addresses in bytes.
RANKS, SCALING, A_OFFSET, B_OFFSET, NARROW, SLOTS, ARENA, LORA_SIZE = range(8)


@compiled()
def _zero(out, out_step, rows, columns):
    for row in range(rows):
        for column in range(columns):
            store(out + row * out_step, column, float32(0), float32(0))


@compiled()
def _shrink(x, x_step, rows, a, depth, rank, scale, s, s_step, sample):
    """s[i, j] = scale · x[i] · a[j]."""
    step = depth * bytes_of(sample)
    row = 0
    while row + 3 <= rows:
        dots_for_three(x + row * x_step, x_step, a, step, depth, rank, scale, s + row * s_step, s_step, sample)
        row += 3
    while row < rows:
        dots_for_one(x + row * x_step, x_step, a, step, depth, rank, scale, s + row * s_step, s_step, sample)
        row += 1


@compiled()
def _expand(s, s_step, rows, b, width, rank, out, out_step, add, sample):
    """out[i, 0:width] (+)= s[i] · b; width is a multiple of PANEL."""
    size = bytes_of(sample)
    column = 0
    if rows <= 3:
        many = PANEL * (4 if rows == 1 else 2)
        while column + many <= width:
            expand_few(rows, s, s_step, b + column * size, width * size, rank, out + column * 4, out_step, add, sample)
            column += many
    blocks = (rows + MAX_ROWS - 1) // MAX_ROWS
    while column < width:
        for block in range(blocks):
            start, stop = rows * block // blocks, rows * (block + 1) // blocks
            expand(
                stop - start, s + start * s_step, s_step, b + column * size, width * size, rank,
                out + start * out_step + column * 4, out_step, add, sample,
            )  # fmt: skip
        column += PANEL


@compiled()
def low_rank(lora, row, slot, x, x_step, rows, depth, out, out_step, width, add, buffer):
    """out[i, 0:width] (+)= c · (x[i] · Aᵀ) · Bᵀ for up to ITEM_ROWS rows of one slot.

    Without `add`, `out` is written even where the slot does not adapt the module. Steps in bytes; x and out float32.

    Args:
        lora: int64 [LORA_SIZE].
        row: of the module in the tables.
        slot: column of the tables.
        depth, width: columns of A and of Bᵀ, multiples of PANEL.
        buffer: address of ITEM_ROWS · rank float32.
    """
    at = row * lora[SLOTS] + slot
    rank = np.int64(peek(lora[RANKS], at, np.int32(0)))
    if rank == 0:
        if not add:
            _zero(out, out_step, rows, width)
        return
    scale = peek(lora[SCALING], at, float32(0))
    a, b = peek(lora[A_OFFSET], at, np.int64(0)), peek(lora[B_OFFSET], at, np.int64(0))
    if peek(lora[NARROW], slot, np.uint8(0)):
        _shrink(x, x_step, rows, lora[ARENA] + 2 * a, depth, rank, scale, buffer, rank * 4, uint16(0))
        _expand(buffer, rank * 4, rows, lora[ARENA] + 2 * b, width, rank, out, out_step, add, uint16(0))
    else:
        _shrink(x, x_step, rows, lora[ARENA] + 4 * a, depth, rank, scale, buffer, rank * 4, float32(0))
        _expand(buffer, rank * 4, rows, lora[ARENA] + 4 * b, width, rank, out, out_step, add, float32(0))
