"""The compiled part of paged attention; `tenora_kernels.cpu.attention.attention` calls it."""

from __future__ import annotations

import numpy as np
from numba import float32

from tenora_kernels.cpu.attention.attention_tiles import (
    LOWEST,
    MAX_ROWS,
    PANEL,
    PANELS,
    score,
    score_pair,
    score_quad,
    softmax,
    weigh,
    weigh_half,
    weigh_pair,
    weigh_quad,
)
from tenora_kernels.cpu.runtime.arguments import declare
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import FAST, load, rounded, size_of, store

__all__ = ["CALL", "KEY_BLOCK", "PHASES", "attend_job", "attend_phases", "workspace_floats"]

KEY_BLOCK = PANEL * PANELS
"""Positions between two corrections of the running sums."""

WRITE_TOKENS = 16
"""Tokens whose keys and values one task writes."""

PHASES = 3
"""Of `attend_job`."""

CALL = declare(
    "q", "k", "v", "stride", "out", "cos", "sin", "norm", "keys", "values",
    "heads", "kv_heads", "dim", "block_size", "window", "tile_rows", "writes_first", "workspace", "workspace_step",
)  # fmt: skip
"""Addresses and strides are in bytes; strides are from token to token. A rope or a norm that does not exist is 0."""


def workspace_floats(rows: int, dim: int) -> int:
    """float32 values that a member needs for tiles of so many rows: q, sums, scores, state, and packed panels."""
    return rows * (2 * dim + KEY_BLOCK + 3) + 2 * KEY_BLOCK * dim


@compiled(fastmath=FAST)
def _inverse_norm(row, dim, eps, sample):
    """1 / √(mean(x²) + ε) of a row."""
    total = float32(0.0)
    for i in range(dim):
        x = load(row, i, sample)
        total += x * x
    return float32(1.0) / np.sqrt(total / float32(dim) + eps)


@compiled()
def _prepare(row, token, head, call, eps, scale, target, sample):
    """target float32 [dim] = scale · a head's row, normalised and rotated as far as the call asks for it.

    Rounded where the modules of the decoder round: after the norm, its product with the weight, and every step of the
    rotation. Without fused operations, so that the rotation equals torch's to the bit.
    """
    dim = call.dim
    if call.norm != 0:
        inverse = _inverse_norm(row, dim, eps, sample)
        weight = call.norm + head * dim * size_of(sample)
        for i in range(dim):
            x = rounded(load(row, i, sample) * inverse, sample)
            store(target, i, rounded(x * load(weight, i, sample), sample), float32(0))
    else:
        for i in range(dim):
            store(target, i, load(row, i, sample), float32(0))
    if call.cos != 0:
        half = dim // 2
        cos, sin = call.cos + token * dim * size_of(sample), call.sin + token * dim * size_of(sample)
        for i in range(half):
            a, b = load(target, i, float32(0)), load(target, half + i, float32(0))
            rotated_a = rounded(b * load(sin, i, sample), sample)
            rotated_b = rounded(a * load(sin, half + i, sample), sample)
            first = rounded(a * load(cos, i, sample), sample) - rotated_a
            second = rounded(b * load(cos, half + i, sample), sample) + rotated_b
            store(target, i, rounded(first, sample) * scale, float32(0))
            store(target, half + i, rounded(second, sample) * scale, float32(0))
    else:
        for i in range(dim):
            store(target, i, load(target, i, float32(0)) * scale, float32(0))


@compiled()
def _write(token, head, slot, call, eps, buffer, sample):
    """Put the key and the value of one token and head into the cache."""
    size, dim, block_size = size_of(sample), call.dim, call.block_size
    block, offset = slot // block_size, slot % block_size
    area = (block * call.kv_heads + head) * dim * block_size
    at = token * call.stride + head * dim * size
    _prepare(call.k + at, token, call.heads + head, call, eps, float32(1.0), buffer, sample)
    keys = call.keys + (area + offset) * size
    for i in range(dim):
        store(keys, i * block_size, load(buffer, i, float32(0)), sample)
    values = call.values + (area + offset * dim) * size
    for i in range(dim):
        store(values, i, load(call.v + at, i, sample), sample)


@compiled()
def _pack(table, head, base, keys, call, packed_keys, packed_values, sample):
    """Copy up to 16 positions from `base` on into panels, for blocks that do not consist of whole panels."""
    dim, block_size = call.dim, call.block_size
    for j in range(keys):
        area = (table[(base + j) // block_size] * call.kv_heads + head) * dim * block_size
        offset = (base + j) % block_size
        for i in range(dim):
            store(packed_keys, i * PANEL + j, load(call.keys, area + i * block_size + offset, sample), sample)
            store(packed_values, j * dim + i, load(call.values, area + offset * dim + i, sample), sample)


@compiled()
def _find_panels(table, head, base, end, call, panels, packed, sample):
    """Fill in the panels of the positions from `base` on, up to `end` and up to a block; give the stride of keys.

    panels int64 [3, 4]: addresses of the panels of keys, of values, and of keys of the next block (to fetch from).
    """
    size, dim, block_size = size_of(sample), call.dim, call.block_size
    direct = block_size % PANEL == 0
    for panel in range(PANELS):
        first = base + panel * PANEL
        if first >= end:
            break
        if direct:
            area = (table[first // block_size] * call.kv_heads + head) * dim
            offset = first % block_size
            panels[0, panel] = call.keys + (area * block_size + offset) * size
            panels[1, panel] = call.values + (area * block_size + offset * dim) * size
            later = first + KEY_BLOCK if first + KEY_BLOCK < end else first
            area = (table[later // block_size] * call.kv_heads + head) * dim
            panels[2, panel] = call.keys + (area * block_size + later % block_size) * size
        else:
            panels[0, panel] = packed + 2 * panel * PANEL * dim * size
            panels[1, panel] = panels[2, panel] = packed + (2 * panel + 1) * PANEL * dim * size
            _pack(table, head, first, min(PANEL, end - first), call, panels[0, panel], panels[1, panel], sample)
    return (block_size if direct else PANEL) * size


@compiled()
def _score_rows(first, last, reach, whole, key_step, group, at, panels, call, sample):
    """Scores of the rows first … last - 1; a row of query i reaches the positions up to reach + i of the block."""
    q, _, s, _, _ = at
    dim, table = call.dim, panels.ctypes.data
    rows, step = last - first, call.dim * 4
    panel = 0
    if rows <= 3:
        while rows == 1 and panel + 4 <= whole:
            target = s + (first * KEY_BLOCK + panel * PANEL) * 4
            score_quad(1, q + first * step, step, table + panel * 8, key_step, dim, target, KEY_BLOCK * 4, sample)
            panel += 4
        while panel + 2 <= whole:
            target = s + (first * KEY_BLOCK + panel * PANEL) * 4
            score_pair(rows, q + first * step, step, table + panel * 8, key_step, dim, target, KEY_BLOCK * 4, sample)
            panel += 2
    while panel < whole:
        # Earlier queries end before this panel.
        row = max(first, (panel * PANEL - reach) * group)
        while row < last:
            target, count = s + (row * KEY_BLOCK + panel * PANEL) * 4, min(MAX_ROWS, last - row)
            score(count, q + row * step, step, table + panel * 8, key_step, dim, target, KEY_BLOCK * 4, sample)
            row += count
        panel += 1


@compiled()
def _weigh_rows(first, last, reach, keys, group, at, panels, call, sample):
    """Add the values of a block to the sums of the rows first … last - 1."""
    _, o, s, _, shrink = at
    dim, table = call.dim, panels[1].ctypes.data
    step, o_step, rows, column = call.dim * size_of(sample), call.dim * 4, last - first, 0
    s_row, o_row, factor = s + first * KEY_BLOCK * 4, o + first * o_step, shrink + first * 4
    if rows <= 3:
        while rows == 1 and column + 64 <= dim:
            weigh_quad(1, s_row, KEY_BLOCK * 4, factor, table, keys, column, step, o_row, o_step, sample)
            column += 64
        while column + 32 <= dim:
            weigh_pair(rows, s_row, KEY_BLOCK * 4, factor, table, keys, column, step, o_row, o_step, sample)
            column += 32
    while column < dim:
        row = first
        while row < last:
            count = min(MAX_ROWS, last - row)
            # The weights of later keys are 0.
            seen = min(keys, reach + (row + count - 1) // group + 1)
            s_row, o_row, factor = s + row * KEY_BLOCK * 4, o + row * o_step, shrink + row * 4
            if column + 16 <= dim:
                weigh(count, s_row, KEY_BLOCK * 4, factor, table, seen, column, step, o_row, o_step, sample)
            else:
                weigh_half(count, s_row, KEY_BLOCK * 4, factor, table, seen, column, step, o_row, o_step, sample)
            row += count
        column += 16


@compiled()
def _attend_block(item, table, head, base, call, at, panels, packed, sample):
    """Let the rows of an item see the positions base … base + 63 as far as they may."""
    _, _, s, state, shrink = at
    _, count, position = item
    window, group = call.window, call.heads // call.kv_heads
    keys = min(KEY_BLOCK, position + count - base)
    reach = position - base  # of the first query, within the block
    # Rows before `first` come before the block, rows from `last` on have left it behind.
    first, last = max(0, -reach) * group, min(count, KEY_BLOCK + window - 1 - reach) * group
    whole = (keys + PANEL - 1) // PANEL
    key_step = _find_panels(table, head, base, position + count, call, panels, packed, sample)
    _score_rows(first, last, reach, whole, key_step, group, at, panels, call, sample)
    for row in range(first, last):
        newest = reach + row // group
        oldest = max(0, newest - window + 1)
        softmax(s + row * KEY_BLOCK * 4, whole, oldest, min(newest + 1, keys), state + row * 8, shrink + row * 4)
    _weigh_rows(first, last, reach, keys, group, at, panels, call, sample)


@compiled()
def _attend_item(item, table, head, kv_slots, call, scale, eps, at, panels, packed, sample):
    """One key head of a run of queries of one sequence."""
    q, o, _, state, _ = at
    start, count, position = item
    size, dim, group = size_of(sample), call.dim, call.heads // call.kv_heads
    if call.writes_first == 0:
        _write(start, head, kv_slots[start], call, eps, q, sample)
    rows = count * group
    for row in range(rows):
        token, query_head = start + row // group, head * group + row % group
        source = call.q + token * call.stride + query_head * dim * size
        _prepare(source, token, query_head, call, eps, scale, q + row * dim * 4, sample)
        store(state, 2 * row, float32(LOWEST), float32(0))
        store(state, 2 * row + 1, float32(0), float32(0))
    for i in range(rows * dim):
        store(o, i, float32(0), float32(0))
    oldest = max(0, position - call.window + 1) // KEY_BLOCK
    for block in range(oldest, (position + count - 1) // KEY_BLOCK + 1):
        _attend_block(item, table, head, block * KEY_BLOCK, call, at, panels, packed, sample)
    for row in range(rows):
        inverse = float32(1.0) / load(state, 2 * row + 1, float32(0))
        target = call.out + ((start + row // group) * call.heads + head * group + row % group) * dim * size
        for i in range(dim):
            store(target, i, load(o, row * dim + i, float32(0)) * inverse, sample)


@compiled()
def _write_tokens(control, phase, kv_slots, call, eps, buffer, sample):
    """Keys and values of every token of the step."""
    tokens = kv_slots.shape[0]
    tasks = (tokens + WRITE_TOKENS - 1) // WRITE_TOKENS
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        for token in range(task * WRITE_TOKENS, min(tokens, (task + 1) * WRITE_TOKENS)):
            for head in range(call.kv_heads):
                _write(token, head, kv_slots[token], call, eps, buffer, sample)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def attend_phases(control, phase, member, panels, kv_slots, tables, items, call, scale, eps, sample):
    """One layer of a step as the phases `phase` and `phase + 1` of a team's job.

    Args:
        control: the team's.
        phase: the first of the two.
        member: number of the calling member, from 0 on.
        panels: int64 [members, 3, PANELS], overwritten.
        kv_slots: int64 [T], the KV slot of each token.
        tables: int32 [B, max_blocks].
        items: int64 [n, 4], the longest first: sequence, first token, number of tokens, position of the first.
        call: CALL.
        scale: what scores are multiplied with.
        eps: of the norm of q and k.
        sample: of q, k, v and the cache, see `values`.
    """
    rows, dim, kv_heads = call.tile_rows, call.dim, call.kv_heads
    q = call.workspace + member * call.workspace_step
    o = q + rows * dim * 4
    s = o + rows * dim * 4
    state = s + rows * KEY_BLOCK * 4
    shrink = state + rows * 8
    if call.writes_first != 0:
        _write_tokens(control, phase, kv_slots, call, eps, q, sample)
    tasks = items.shape[0] * kv_heads
    while True:
        task = claim(control, phase + 1, tasks)
        if task < 0:
            break
        row = items[task // kv_heads]
        _attend_item(
            (row[1], row[2], row[3]), tables[row[0]], task % kv_heads, kv_slots, call, scale, eps,
            (q, o, s, state, shrink), panels[member], shrink + rows * 4, sample,
        )  # fmt: skip
        complete(control, phase + 1)
    join(control, phase + 1, tasks)


@job()
def attend_job(control, panels, kv_slots, tables, items, calls, scale, eps, sample):
    """`attend_phases` as a job of its own, for `Team.run` with PHASES phases; the first numbers the members.

    Args:
        control, panels, kv_slots, tables, items, scale, eps, sample: as in `attend_phases`.
        calls: CALL [1].
    """
    member = claim(control, 0, panels.shape[0])
    attend_phases(control, 1, member, panels, kv_slots, tables, items, calls[0], scale, eps, sample)
