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
from tenora_kernels.cpu.decoder.epilogue import copy_row, end_block, finish_rows
from tenora_kernels.cpu.lowrank.factors import COUNT, DEPTH, MODULE, SLICES
from tenora_kernels.cpu.lowrank.lowrank import factor_of, low_rank
from tenora_kernels.cpu.products.gemm import PANEL, group_of, multiply_rows, tile_count, tile_of
from tenora_kernels.cpu.products.product import packed_entry
from tenora_kernels.cpu.runtime.arguments import declare
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import FAST, load, peek, store

__all__ = ["LAYER", "MORE_PHASES", "PHASES_PER_LAYER", "STEP", "run_step"]

STEP = declare(
    "rows", "base_rows", "layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "activation", "ids", "table", "x",
    "normed", "qkv", "attended", "gate_up", "buffers", "buffer_step", "final_norm", "items", "numbers", "modules",
    "taps", "first_tap", "plain_rows", "plain_items", "slots_of_rows", "residual", "scales", "bottlenecks",
    "outer_biases", "inner_biases",
)  # fmt: skip
"""Addresses in bytes; float32 with rows of the sizes in brackets: x, normed [hidden], qkv, attended [q], gate_up
[2 · mlp]; buffers: one for each member.

base_rows: rows before the first one that has an adapter; the rows from there on all have one. items: how many entries
the array `adapted` has. numbers: int64 0, 1, … rows - 1. modules: of a layer. taps: float32 [layers - first_tap, rows,
hidden], where X goes before each layer from first_tap on; 0 if nobody wants it. plain_rows, plain_items: rows and
entries before the first one whose adapter has an epilogue (see `epilogue`); all from there on have one. slots_of_rows:
int64 [rows]. residual [hidden]: of the rows with an epilogue. scales, bottlenecks, outer_biases, inner_biases: rows in
the tables of the first layer's first one.
"""

LAYER = declare(
    "input_norm", "qkv_weight", "qkv_bias", "qk_norm", "o_weight", "o_bias", "mlp_norm", "gate_up_weight",
    "gate_up_bias", "down_weight", "down_bias", "keys", "values", "window",
)  # fmt: skip
"""A bias or a norm that does not exist is 0."""

PHASES_PER_LAYER = 14
_FIRST_PHASES = 2
MORE_PHASES = 3
"""Beside those of the layers: who is who, the embedding, the final norm."""
_NORM_ROWS = 8


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
def _norm(control, phase, step, weight, eps, tap):
    """NORMED = the norm of X. tap: where X is copied to, or 0.

    Of rows with an epilogue X is kept as RESIDUAL: their block's output takes its place.
    """
    rows, columns = step.rows, step.hidden
    tasks = (rows + _NORM_ROWS - 1) // _NORM_ROWS
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        for row in range(task * _NORM_ROWS, min(rows, (task + 1) * _NORM_ROWS)):
            at = row * columns * 4
            _norm_row(step.x + at, weight, columns, eps, step.normed + at)
            if tap:
                copy_row(step.x + at, columns, tap + at)
            if row >= step.plain_rows:
                copy_row(step.x + at, columns, step.residual + at - step.plain_rows * columns * 4)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _embed(control, step, sample):
    """X = the rows of the packed table that the tokens name."""
    rows, columns = step.rows, step.hidden
    tasks = (rows + _NORM_ROWS - 1) // _NORM_ROWS
    while True:
        task = claim(control, 1, tasks)
        if task < 0:
            break
        for row in range(task * _NORM_ROWS, min(rows, (task + 1) * _NORM_ROWS)):
            token = peek(step.ids, row, np.int64(0))
            panel, column = token // PANEL, token % PANEL
            out = step.x + row * columns * 4
            for i in range(columns):
                store(out, i, packed_entry(step.table, panel * columns + i, column, sample), float32(0))
        complete(control, 1)
    join(control, 1, tasks)


@compiled()
def _adapters(control, phase, step, lora, adapted, before, site, x, x_step, out, out_step, add, buffer):
    """Every adapted row's low-rank term for the modules of a site; `before`: modules of the layers below.

    What they add to where `add` is given, rows with an epilogue begin with: there is nothing of them in `out` yet.
    A member claims its next task before it does the one at hand, whose arithmetic hides the fetching of that one's A.
    """
    module, count, depth = before + site[MODULE], site[COUNT], site[DEPTH]
    tasks = step.items * count
    task = claim(control, phase, tasks)
    while task >= 0:
        following = claim(control, phase, tasks)
        ahead, ahead_size = 0, 0
        if following >= 0:
            rank, size, ahead = factor_of(lora, module + following % count, adapted[following // count, 0])
            ahead_size = rank * size * depth
        slot, first, rows = adapted[task // count]
        column, width = site[SLICES + 2 * (task % count)], site[SLICES + 2 * (task % count) + 1]
        low_rank(
            lora, module + task % count, slot, x, x_step, step.numbers + 8 * first, rows, depth, out + column * 4,
            out_step, width, add and task // count < step.plain_items, buffer, ahead, ahead_size,
        )  # fmt: skip
        complete(control, phase)
        task = following
    join(control, phase, tasks)


@compiled()
def _product(
    control, phase, step, lora, before, site, fresh, x, x_step, w, panels, depth, out, out_step, bias, sample,
):  # fmt: skip
    """The product of a site with the frozen weights, and what follows it in each row; see `gemm.multiply_rows`."""
    group = group_of(panels)
    tasks = tile_count(step.rows, panels, group)
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, step.rows, panels, group)
        multiply_rows(start, stop, fresh, x, x_step, w, first, last, panels, depth, out, out_step, sample)
        finish_rows(start, stop, first * PANEL, last * PANEL, step, lora, before, site, out, out_step, bias)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _gate_up(control, phase, step, lora, before, site, w, bias, sample):
    """The gate's half of GATE_UP = act(gate) · up; a task makes the same columns of both."""
    rows, hidden, mlp = step.rows, step.hidden, step.mlp
    panels = mlp // PANEL
    group = max(2, group_of(panels) // 2)
    tasks, out_step, x_step = tile_count(rows, panels, group), 2 * mlp * 4, hidden * 4
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, rows, panels, group)
        for half in range(2):
            low, high = half * panels + first, half * panels + last
            multiply_rows(
                start, stop, step.base_rows, step.normed, x_step, w, low, high, 2 * panels, hidden, step.gate_up,
                out_step, sample,
            )  # fmt: skip
            finish_rows(
                start, stop, low * PANEL, high * PANEL, step, lora, before, site, step.gate_up, out_step, bias
            )  # fmt: skip
        for row in range(start, stop):
            gate = step.gate_up + row * out_step + first * PANEL * 4
            activate(gate, gate + mlp * 4, (last - first) * PANEL, step.activation)
        complete(control, phase)
    join(control, phase, tasks)


@job()
def run_step(
    control, step, layers, lora, adapted, sites, calls, kv_slots, tables, items, panels, members, scale, eps, sample,
):  # fmt: skip
    """The job. Afterwards NORMED holds the hidden states after the final norm.

    Args:
        control: the team's.
        step: STEP [1].
        layers: LAYER [L].
        lora: `lowrank.LORA` [1].
        adapted: int64 [n, 3]: slot, first row and number of rows (at most ITEM_ROWS) of a piece of the batch.
        sites: qkv, o, gate_up and down, see `lowrank.factors`.
        calls, kv_slots, tables, items, panels: attention's, as `paged.attend_job` takes them; `calls` is copied.
        members: how many threads share the work.
        scale: of the scores.
        eps: of the norms.
        sample: of the weights, see `gemm`.
    """
    step, lora = step[0], lora[0]
    member = max(0, claim(control, 0, members))
    hidden, q_size, mlp = step.hidden, step.heads * step.head_dim, step.mlp
    qkv_size = (step.heads + 2 * step.kv_heads) * step.head_dim
    buffer = step.buffers + member * step.buffer_step
    adapts, ends = step.items > 0, step.items > step.plain_items
    own = calls.copy()
    _embed(control, step, sample)
    for index in range(step.layers):
        layer, before = layers[index], index * step.modules
        phase = _FIRST_PHASES + index * PHASES_PER_LAYER
        normed, gate_up, attended = step.normed, step.gate_up, step.attended
        tap = np.int64(0)
        if step.taps and index >= step.first_tap:
            tap = step.taps + (index - step.first_tap) * step.rows * hidden * 4
        _norm(control, phase, step, layer.input_norm, eps, tap)
        if adapts:
            _adapters(
                control, phase + 1, step, lora, adapted, before, sites[0], normed, hidden * 4, step.qkv, qkv_size * 4,
                False, buffer,
            )  # fmt: skip
        _product(
            control, phase + 2, step, lora, before, sites[0], step.base_rows, normed, hidden * 4, layer.qkv_weight,
            qkv_size // PANEL, hidden, step.qkv, qkv_size * 4, layer.qkv_bias, sample,
        )  # fmt: skip
        call = own[0]
        call.norm, call.window, call.keys, call.values = layer.qk_norm, layer.window, layer.keys, layer.values
        paged.attend_phases(control, phase + 3, member, panels, kv_slots, tables, items, call, scale, eps, float32(0))
        if adapts:
            _adapters(
                control, phase + 5, step, lora, adapted, before, sites[1], attended, q_size * 4, step.x, hidden * 4,
                True, buffer,
            )  # fmt: skip
        _product(
            control, phase + 6, step, lora, before, sites[1], 0, attended, q_size * 4, layer.o_weight, hidden // PANEL,
            q_size, step.x, hidden * 4, layer.o_bias, sample,
        )  # fmt: skip
        if ends:
            end_block(control, phase + 7, step, lora, adapted, 2 * index, buffer)
        _norm(control, phase + 8, step, layer.mlp_norm, eps, np.int64(0))
        if adapts:
            _adapters(
                control, phase + 9, step, lora, adapted, before, sites[2], normed, hidden * 4, gate_up, 2 * mlp * 4,
                False, buffer,
            )  # fmt: skip
        _gate_up(control, phase + 10, step, lora, before, sites[2], layer.gate_up_weight, layer.gate_up_bias, sample)
        if adapts:
            _adapters(
                control, phase + 11, step, lora, adapted, before, sites[3], gate_up, 2 * mlp * 4, step.x, hidden * 4,
                True, buffer,
            )  # fmt: skip
        _product(
            control, phase + 12, step, lora, before, sites[3], 0, gate_up, 2 * mlp * 4, layer.down_weight,
            hidden // PANEL, mlp, step.x, hidden * 4, layer.down_bias, sample,
        )  # fmt: skip
        if ends:
            end_block(control, phase + 13, step, lora, adapted, 2 * index + 1, buffer)
    _norm(control, _FIRST_PHASES + step.layers * PHASES_PER_LAYER, step, step.final_norm, eps, np.int64(0))
