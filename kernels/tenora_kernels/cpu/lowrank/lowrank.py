"""One adapter's share of one projection for a few rows of a batch: shrink and expand without leaving the cache."""

from __future__ import annotations

import numpy as np
from numba import float32, uint16

from tenora_kernels.cpu.lowrank.lora_blocks import expand_rows, shrink_rows
from tenora_kernels.cpu.runtime.arguments import declare
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.values import peek, size_of, store

__all__ = ["ITEM_ROWS", "LORA", "factor_of", "low_rank", "second_factor"]

ITEM_ROWS = 24
"""Rows of one call at most: as many as read A and Bᵀ once from the cache."""

LORA = declare("ranks", "scaling", "a_offset", "b_offset", "is_bf16", "slots", "flags", "arena")
"""Where the tables of `layout.LoraTables` lie, addresses in bytes, and how many slots they have."""


@compiled()
def factor_of(lora, row, slot):
    """Rank of a module in a slot, bytes of an element of its matrices, and the address of A."""
    at = row * lora.slots + slot
    size = 2 if peek(lora.is_bf16, slot, np.uint8(0)) else 4
    rank = np.int64(peek(lora.ranks, at, np.int32(0)))
    return rank, size, lora.arena + size * peek(lora.a_offset, at, np.int64(0))


@compiled()
def second_factor(lora, row, slot, size):
    """The address of Bᵀ of a module in a slot whose elements have `size` bytes, and the module's scaling."""
    at = row * lora.slots + slot
    return lora.arena + size * peek(lora.b_offset, at, np.int64(0)), peek(lora.scaling, at, float32(0))


@compiled()
def _zero(out, out_step, rows, columns):
    for row in range(rows):
        for column in range(columns):
            store(out + row * out_step, column, float32(0), float32(0))


@compiled()
def _apply(x, x_step, index, rows, depth, a, b, rank, scale, out, out_step, width, buffer, ahead, ahead_size, sample):
    size = size_of(sample)
    shrink_rows(
        x, x_step, index, rows, a, depth, rank, scale, buffer, b, rank * width * size, float32(0), sample
    )  # fmt: skip
    expand_rows(
        buffer, rank * 4, 4, rows, rank, b, width * size, width, out, out_step, index, ahead, ahead_size, float32(0),
        sample,
    )  # fmt: skip


@compiled()
def low_rank(lora, row, slot, x, x_step, index, rows, depth, out, out_step, width, add, buffer, ahead, ahead_size):
    """out[i, 0:width] (+)= c · (x[i] · Aᵀ) · Bᵀ for up to ITEM_ROWS rows i of one slot.

    Without `add`, `out` is written even where the slot does not adapt the module. Steps in bytes; x and out float32.

    Args:
        lora: LORA.
        row: of the module in the tables.
        slot: column of the tables.
        index: address of int64 numbers, which follow one another: the rows i of x and out.
        depth, width: columns of A and of Bᵀ.
        buffer: address of ITEM_ROWS · rank float32.
        ahead, ahead_size: bytes to fetch into the cache meanwhile: what the caller reads next.
    """
    rank, size, a = factor_of(lora, row, slot)
    if not add:
        _zero(out + peek(index, 0, np.int64(0)) * out_step, out_step, rows, width)
    if rank == 0:
        return
    b, scale = second_factor(lora, row, slot, size)
    if size == 2:
        _apply(x, x_step, index, rows, depth, a, b, rank, scale, out, out_step, width, buffer, ahead, ahead_size,
               uint16(0))  # fmt: skip
    else:
        _apply(x, x_step, index, rows, depth, a, b, rank, scale, out, out_step, width, buffer, ahead, ahead_size,
               float32(0))  # fmt: skip
