"""Grouping the rows of a step by slot, on the device: a stable counting sort by comparison, then one scan.

No atomics, no host synchronisation, no allocation; the result depends on the input only.
"""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import jit

_LAST = tl.constexpr(2**30)
"""The sort key of base rows: they follow all others."""


@jit("rows")
def sort_rows(
    slot_of_row: tl.tensor,
    perm: tl.tensor,
    sorted_slot: tl.tensor,
    within: tl.tensor,
    rows: tl.tensor,
    block: tl.constexpr,
) -> None:
    """One program per `block` rows: counts how many rows come before each of its own. O(T²) comparisons, no traffic.

    Args:
        slot_of_row: int [rows], negative for base rows.
        perm: int32 [rows], written: rows in order of slot, base rows last, stable.
        sorted_slot: int32 [rows], written: the slot of each position of perm, -1 for base rows.
        within: int32 [rows], written: the place of each position within its slot.
        rows: T.
        block: rows per program and per comparison step, a power of two.
    """
    t = tl.program_id(0) * block + tl.arange(0, block)
    slot = tl.load(slot_of_row + t, mask=t < rows, other=-1).to(tl.int32)
    key = tl.where(slot < 0, _LAST, slot)
    before = tl.zeros([block], tl.int32)
    inside = tl.zeros([block], tl.int32)
    for start in range(0, rows, block):
        other = start + tl.arange(0, block)
        other_slot = tl.load(slot_of_row + other, mask=other < rows, other=-1).to(tl.int32)
        other_key = tl.where(other_slot < 0, _LAST, other_slot)
        exists = (other < rows)[None, :]
        lower = exists & (other_key[None, :] < key[:, None])
        earlier = exists & (other_key[None, :] == key[:, None]) & (other[None, :] < t[:, None])
        before += tl.sum(lower.to(tl.int32), axis=1)
        inside += tl.sum(earlier.to(tl.int32), axis=1)
    position = before + inside
    tl.store(perm + position, t, mask=t < rows)
    tl.store(sorted_slot + position, tl.where(slot < 0, -1, slot), mask=t < rows)
    tl.store(within + position, inside, mask=t < rows)


@jit()
def _append(
    starts: tl.tensor, slots: tl.tensor, count: tl.tensor, begins: tl.tensor, p: tl.tensor, slot: tl.tensor
) -> tl.tensor:
    """Append the positions p that begin a run to a table that holds `count` runs; returns the new count."""
    flags = begins.to(tl.int32)
    index = count + tl.cumsum(flags, 0) - 1
    tl.store(starts + index, p, mask=begins)
    tl.store(slots + index, slot, mask=begins)
    return count + tl.sum(flags, 0)


@jit()
def _close(
    starts: tl.tensor, slots: tl.tensor, count: tl.tensor, end: tl.tensor, limit: tl.tensor, block: tl.constexpr
) -> None:
    """Write `end` behind the last run, up to entry `limit`: the runs that are not there are empty, their slot is -1."""
    for start in range(0, limit + 1, block):
        i = start + tl.arange(0, block)
        tl.store(starts + i, tl.zeros([block], tl.int32) + end, mask=(i >= count) & (i <= limit))
        tl.store(slots + i, tl.full([block], -1, tl.int32), mask=(i >= count) & (i < limit))


@jit("rows", "segments", "small_limit", "large_limit")
def find_tiles(
    sorted_slot: tl.tensor,
    within: tl.tensor,
    seg_ptr: tl.tensor,
    seg_slot: tl.tensor,
    nseg: tl.tensor,
    small_count: tl.tensor,
    small_ptr: tl.tensor,
    small_slot: tl.tensor,
    large_ptr: tl.tensor,
    large_slot: tl.tensor,
    rows: tl.tensor,
    segments: tl.tensor,
    small_limit: tl.tensor,
    large_limit: tl.tensor,
    small: tl.constexpr,
    large: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program: where segments and tiles begin. Run i of a table is `perm[ptr[i]:ptr[i + 1]]`, in slot `slot[i]`.

    Args:
        sorted_slot: int32 [rows], from `sort_rows`.
        within: int32 [rows], from `sort_rows`.
        seg_ptr: int32 [segments + 1], written: segments of adapted rows, one per slot.
        seg_slot: int32 [segments], written.
        nseg: int32 [1], written: their number.
        small_count: int32 [1], written: number of small tiles.
        small_ptr: int32 [small_limit + 1], written: tiles of at most `small` adapted rows.
        small_slot: int32 [small_limit], written.
        large_ptr: int32 [large_limit + 1], written: tiles of at most `large` rows, base rows too, their slot being -1.
        large_slot: int32 [large_limit], written.
        rows: T.
        segments: most segments there can be.
        small_limit: most small tiles there can be.
        large_limit: most large tiles there can be.
        small: rows of a small tile.
        large: rows of a large tile.
        block: positions per step.
    """
    n_segments = 0
    n_small = 0
    n_large = 0
    adapted_rows = 0
    for start in range(0, rows, block):
        p = start + tl.arange(0, block)
        exists = p < rows
        slot = tl.load(sorted_slot + p, mask=exists, other=-1)
        place = tl.load(within + p, mask=exists, other=1)
        adapted = exists & (slot >= 0)
        n_segments = _append(seg_ptr, seg_slot, n_segments, adapted & (place == 0), p, slot)
        n_small = _append(small_ptr, small_slot, n_small, adapted & (place % small == 0), p, slot)
        n_large = _append(large_ptr, large_slot, n_large, exists & (place % large == 0), p, slot)
        adapted_rows += tl.sum(adapted.to(tl.int32), 0)
    _close(seg_ptr, seg_slot, n_segments, adapted_rows, segments, block)
    _close(small_ptr, small_slot, n_small, adapted_rows, small_limit, block)
    _close(large_ptr, large_slot, n_large, rows, large_limit, block)
    tl.store(small_count, n_small)
    tl.store(nseg, n_segments)
