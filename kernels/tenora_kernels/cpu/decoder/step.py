"""A whole decoder step, from the embedding to the final norm, as one job of a `Team`.

One call from Python for the whole stack: with small batches the interpreter would take longer per layer than the
arithmetic. Between two phases nothing waits for a thread that the system has not scheduled (see `team`). Everything is
float32; weights are packed (see `gemm`), the cache is that of `attention`.

Each number is computed in an order that its own row determines, so a row's result has the same bits in any batch.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from tenora_kernels.cpu.attention import paged
from tenora_kernels.cpu.decoder.activation import activate
from tenora_kernels.cpu.lowrank.lowrank import factor_of, low_rank
from tenora_kernels.cpu.products.gemm import PANEL, group_of, multiply_rows, product_phase, tile_count, tile_of
from tenora_kernels.cpu.products.product import packed_entry
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import FAST, load, peek, store

__all__ = ["LAYER_SIZE", "MORE_PHASES", "PHASES_PER_LAYER", "STEP_SIZE", "run_step"]

# Places in the array `step`. Addresses in bytes; buffers are float32 with rows of the sizes in brackets.
(
    ROWS, BASE_ROWS, LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, ACTIVATION,
    IDS, TABLE, TABLE_PANELS, X, NORMED, QKV, ATTENDED, GATE_UP, BUFFERS, BUFFER_STEP, FINAL_NORM, ITEMS,
    NUMBERS, STEP_SIZE,
) = range(23)  # fmt: skip
"""X [hidden], NORMED [hidden], QKV, ATTENDED [q], GATE_UP [2 · mlp]; BUFFERS: one for each member.

BASE_ROWS: rows before the first one that has an adapter; the rows from there on all have one. ITEMS: how many entries
the array `adapted` has. NUMBERS: int64 0, 1, … ROWS - 1.
"""

# Places in a row of the array `layers`. A bias or a norm that does not exist is 0.
(
    INPUT_NORM, QKV_WEIGHT, QKV_BIAS, QK_NORM, O_WEIGHT, O_BIAS, MLP_NORM, GATE_UP_WEIGHT, GATE_UP_BIAS, DOWN_WEIGHT,
    DOWN_BIAS, KEYS, VALUES, WINDOW, LAYER_SIZE,
) = range(15)  # fmt: skip

PHASES_PER_LAYER = 12
_FIRST_PHASES = 2
MORE_PHASES = 3
"""Beside those of the layers: who is who, the embedding, the final norm."""
_NORM_ROWS = 8
_MODULES = 7  # of a layer in the tables: q, k, v, o, gate, up, down


@compiled(fastmath=FAST)
def _sum_of_squares(row, columns):
    total = float32(0.0)
    for i in range(columns):
        x = load(row, i, float32(0))
        total += x * x
    return total


@compiled()
def _norm_row(x, weight, columns, eps, out):
    """out = x / √(mean(x²) + ε) · weight."""
    inverse = float32(1.0) / np.sqrt(_sum_of_squares(x, columns) / float32(columns) + eps)
    for i in range(columns):
        store(out, i, load(x, i, float32(0)) * inverse * load(weight, i, float32(0)), float32(0))


@compiled()
def _norm(control, phase, step, weight, eps):
    """NORMED = the norm of X."""
    rows, columns = step[ROWS], step[HIDDEN]
    tasks = (rows + _NORM_ROWS - 1) // _NORM_ROWS
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        for row in range(task * _NORM_ROWS, min(rows, (task + 1) * _NORM_ROWS)):
            at = row * columns * 4
            _norm_row(step[X] + at, weight, columns, eps, step[NORMED] + at)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _embed(control, step, sample):
    """X = the rows of the packed table that the tokens name."""
    rows, columns = step[ROWS], step[HIDDEN]
    tasks = (rows + _NORM_ROWS - 1) // _NORM_ROWS
    while True:
        task = claim(control, 1, tasks)
        if task < 0:
            break
        for row in range(task * _NORM_ROWS, min(rows, (task + 1) * _NORM_ROWS)):
            token = peek(step[IDS], row, np.int64(0))
            panel, column = token // PANEL, token % PANEL
            out = step[X] + row * columns * 4
            for i in range(columns):
                store(out, i, packed_entry(step[TABLE], panel * columns + i, column, sample), float32(0))
        complete(control, 1)
    join(control, 1, tasks)


@compiled()
def _adapters(control, phase, step, lora, adapted, module, slices, x, x_step, depth, out, out_step, add, buffer):
    """Every adapted row's low-rank term for the modules of a group; `slices` int64 [n, 2]: first column and width.

    A member claims its next task before it does the one at hand, whose arithmetic hides the fetching of that one's A.
    """
    count = slices.shape[0]
    tasks = step[ITEMS] * count
    task = claim(control, phase, tasks)
    while task >= 0:
        following = claim(control, phase, tasks)
        ahead, ahead_size = 0, 0
        if following >= 0:
            rank, size, ahead = factor_of(lora, module + following % count, adapted[following // count, 0])
            ahead_size = rank * size * depth
        slot, first, rows = adapted[task // count]
        column, width = slices[task % count]
        low_rank(
            lora, module + task % count, slot, x, x_step, step[NUMBERS] + 8 * first, rows, depth, out + column * 4,
            out_step, width, add, buffer, ahead, ahead_size,
        )  # fmt: skip
        complete(control, phase)
        task = following
    join(control, phase, tasks)


@compiled()
def _gate_up(control, phase, step, w, bias, sample):
    """The gate's half of GATE_UP = act(gate) · up; a task makes the same columns of both."""
    rows, hidden, mlp = step[ROWS], step[HIDDEN], step[MLP]
    panels = mlp // PANEL
    group = max(2, group_of(panels) // 2)
    tasks, out_step, x_step = tile_count(rows, panels, group), 2 * mlp * 4, hidden * 4
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, rows, panels, group)
        for half in range(2):
            multiply_rows(
                start, stop, step[BASE_ROWS], step[NORMED], x_step, w, half * panels + first, half * panels + last,
                2 * panels, hidden, step[GATE_UP], out_step, bias, sample,
            )  # fmt: skip
        for row in range(start, stop):
            gate = step[GATE_UP] + row * out_step + first * PANEL * 4
            activate(gate, gate + mlp * 4, (last - first) * PANEL, step[ACTIVATION])
        complete(control, phase)
    join(control, phase, tasks)


@job()
def run_step(
    control, step, layers, lora, adapted, qkv_slices, o_slices, gate_up_slices, call, slots, tables, items, panels,
    members, scale, eps, sample,
):  # fmt: skip
    """The job. Afterwards NORMED holds the hidden states after the final norm.

    Args:
        control: the team's.
        step: int64 [STEP_SIZE].
        layers: int64 [L, LAYER_SIZE].
        lora: int64 [lowrank.LORA_SIZE].
        adapted: int64 [n, 3]: slot, first row and number of rows (at most ITEM_ROWS) of a piece of the batch.
        qkv_slices, o_slices, gate_up_slices: int64 [modules, 2], first column and width. down has those of o.
        call, slots, tables, items, panels: attention's, as `paged.attend_phases` takes them; `call` is copied.
        members: how many threads share the work.
        scale: of the scores.
        eps: of the norms.
        sample: of the weights, see `gemm`.
    """
    member = max(0, claim(control, 0, members))
    hidden, q_size, mlp = step[HIDDEN], step[HEADS] * step[HEAD_DIM], step[MLP]
    qkv_size = (step[HEADS] + 2 * step[KV_HEADS]) * step[HEAD_DIM]
    buffer = step[BUFFERS] + member * step[BUFFER_STEP]
    adapts = step[ITEMS] > 0
    own = call.copy()
    _embed(control, step, sample)
    for index in range(step[LAYERS]):
        layer, module = layers[index], index * _MODULES
        phase = _FIRST_PHASES + index * PHASES_PER_LAYER
        normed, gate_up, attended = step[NORMED], step[GATE_UP], step[ATTENDED]
        _norm(control, phase, step, layer[INPUT_NORM], eps)
        if adapts:
            _adapters(
                control, phase + 1, step, lora, adapted, module, qkv_slices, normed, hidden * 4, hidden, step[QKV],
                qkv_size * 4, False, buffer,
            )  # fmt: skip
        product_phase(
            control, phase + 2, step[ROWS], step[BASE_ROWS], normed, hidden * 4, layer[QKV_WEIGHT], qkv_size // PANEL,
            hidden, step[QKV], qkv_size * 4, layer[QKV_BIAS], sample,
        )  # fmt: skip
        own[paged.NORM], own[paged.WINDOW] = layer[QK_NORM], layer[WINDOW]
        own[paged.KEYS], own[paged.VALUES] = layer[KEYS], layer[VALUES]
        paged.attend_phases(control, phase + 3, member, panels, slots, tables, items, own, scale, eps, float32(0))
        if adapts:
            _adapters(
                control, phase + 5, step, lora, adapted, module + 3, o_slices, attended, q_size * 4, q_size, step[X],
                hidden * 4, True, buffer,
            )  # fmt: skip
        product_phase(
            control, phase + 6, step[ROWS], 0, attended, q_size * 4, layer[O_WEIGHT], hidden // PANEL, q_size, step[X],
            hidden * 4, layer[O_BIAS], sample,
        )  # fmt: skip
        _norm(control, phase + 7, step, layer[MLP_NORM], eps)
        if adapts:
            _adapters(
                control, phase + 8, step, lora, adapted, module + 4, gate_up_slices, normed, hidden * 4, hidden,
                gate_up, 2 * mlp * 4, False, buffer,
            )  # fmt: skip
        _gate_up(control, phase + 9, step, layer[GATE_UP_WEIGHT], layer[GATE_UP_BIAS], sample)
        if adapts:
            _adapters(
                control, phase + 10, step, lora, adapted, module + 6, o_slices, gate_up, 2 * mlp * 4, mlp, step[X],
                hidden * 4, True, buffer,
            )  # fmt: skip
        product_phase(
            control, phase + 11, step[ROWS], 0, gate_up, 2 * mlp * 4, layer[DOWN_WEIGHT], hidden // PANEL, mlp, step[X],
            hidden * 4, layer[DOWN_BIAS], sample,
        )  # fmt: skip
    _norm(control, _FIRST_PHASES + step[LAYERS] * PHASES_PER_LAYER, step, step[FINAL_NORM], eps)
