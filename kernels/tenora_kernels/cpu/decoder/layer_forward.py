"""A decoder layer for training, forward, as one job of a `Team`: what its backward pass needs stays in memory."""

from __future__ import annotations

from numba import float32

from tenora_kernels.cpu.attention.sequences import QUERIES, attend_item
from tenora_kernels.cpu.attention.split_heads import split_token
from tenora_kernels.cpu.decoder.layer_arguments import SITE_DOWN, SITE_GATE_UP, SITE_O, SITE_QKV, TOKENS_OF_A_TASK
from tenora_kernels.cpu.lowrank.factors import expand, pack_inputs, shrink
from tenora_kernels.cpu.products.gemm import PANEL, add_bias, group_of, multiply_block, tile_count, tile_of
from tenora_kernels.cpu.products.rowwise import gate_forward, norm_rows
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import load, store

__all__ = ["FORWARD_PHASES", "forward_layer"]

FORWARD_PHASES = 12


@compiled()
def _norm_and_shrink(control, phase, layer, x, weight, number, pieces, factors, sites, packs, eps):
    """NORMED = the norm of x, and S of the site that reads it."""
    columns = layer.hidden
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        piece = pieces[task]
        norm_rows(piece, x, weight, columns, eps, layer.normed)
        shrink(piece, factors, sites, number, packs, layer.index, layer.normed, columns * 4, layer.s)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _shrink(control, phase, layer, x, columns, number, pieces, factors, sites, packs):
    """S of a site whose input is there already."""
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        shrink(pieces[task], factors, sites, number, packs, layer.index, x, columns * 4, layer.s)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _copy(source, target, rows, step, low, high):
    for row in range(rows):
        for i in range(low, high):
            store(target + row * step, i, load(source + row * step, i, float32(0)), float32(0))


@compiled()
def _project(
    control, phase, layer, x, depth, weight, bias, columns, residual, out, number, pieces, factors, sites, sample
):  # fmt: skip
    """out = (residual +) x · Wᵀ + bias + the low-rank terms; residual 0: none."""
    rows, panels = layer.rows, columns // PANEL
    group = group_of(panels)
    tasks = tile_count(rows, panels, group)
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, rows, panels, group)
        at = out + start * columns * 4
        if residual != 0:
            _copy(residual + start * columns * 4, at, stop - start, columns * 4, first * PANEL, last * PANEL)
        multiply_block(
            x + start * depth * 4, depth * 4, stop - start, weight, first, last, panels, depth, at, columns * 4,
            1 if residual != 0 else 0, sample,
        )  # fmt: skip
        if bias != 0:
            add_bias(bias, first * PANEL, last * PANEL, stop - start, at, columns * 4)
        expand(
            pieces, start, stop, first * PANEL, last * PANEL, factors, sites, number, layer.index, layer.s, out,
            columns * 4,
        )  # fmt: skip
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _gate_up(control, phase, layer, pieces, factors, sites, sample):
    """GATE_UP and ACTIVE; a task makes the same columns of gate and up."""
    rows, mlp, depth = layer.rows, layer.mlp, layer.hidden
    panels = mlp // PANEL
    group = max(2, group_of(panels) // 2)
    tasks, step = tile_count(rows, panels, group), 2 * mlp * 4
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, rows, panels, group)
        at = layer.gate_up + start * step
        for half in range(2):
            low, high = half * panels + first, half * panels + last
            multiply_block(
                layer.normed + start * depth * 4, depth * 4, stop - start, layer.gate_up_weight, low, high,
                2 * panels, depth, at, step, 0, sample,
            )  # fmt: skip
            if layer.gate_up_bias != 0:
                add_bias(layer.gate_up_bias, low * PANEL, high * PANEL, stop - start, at, step)
            expand(
                pieces, start, stop, low * PANEL, high * PANEL, factors, sites, SITE_GATE_UP, layer.index, layer.s,
                layer.gate_up, step,
            )  # fmt: skip
        for row in range(start, stop):
            gate = layer.gate_up + row * step + first * PANEL * 4
            active = layer.active + (row * mlp + first * PANEL) * 4
            gate_forward(gate, gate + mlp * 4, (last - first) * PANEL, layer.activation, active)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _split(control, phase, layer, attention, places, member, eps, scale):
    tokens = layer.rows
    tasks = (tokens + TOKENS_OF_A_TASK - 1) // TOKENS_OF_A_TASK
    buffer = attention.scores + member * 2 * QUERIES * attention.scores_row * 4
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        for token in range(task * TOKENS_OF_A_TASK, min(tokens, (task + 1) * TOKENS_OF_A_TASK)):
            split_token(attention, token, places[token], False, eps, scale, buffer)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _attend(control, phase, layer, attention, sequences, items, member):
    heads = layer.head_count
    tasks = items.shape[0] * heads
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        item = items[task // heads]
        attend_item(attention, sequences, item[0], task % heads, item[1], item[2], member)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _pack(control, phase, layer, factors, sites, packs, slots):
    tasks = sites.shape[0] * layer.slots
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        pack_inputs(task, factors, sites, packs, slots, layer.index)
        complete(control, phase)
    join(control, phase, tasks)


@job()
def forward_layer(
    control, layer, attention, sequences, items, places, factors, sites, packs, slots, pieces, eps, scale, sample
):  # fmt: skip
    """The job: OUT from X, and everything that is saved on the way.

    Args:
        control: the team's.
        layer: `layer_arguments.FORWARD` [1].
        attention, sequences: see `sequences`; attention [1].
        items: int64 [n, 3]: sequence, first token, number of tokens (at most QUERIES), the longest first.
        places: int64 [T], panel · WIDTH + column of each token's keys.
        factors, sites, packs, slots: see `factors`; factors [1].
        pieces: int64 [n, 4]: slot (-1: the base), first row, rows, number of the slot in `slots`; all rows, in order.
        eps: of the norms.
        scale: of the scores.
        sample: of the weights, see `gemm`.
    """
    layer, attention, factors = layer[0], attention[0], factors[0]
    member = max(0, claim(control, 0, layer.members))
    hidden, mlp, q_size = layer.hidden, layer.mlp, layer.head_count * attention.dim
    qkv_size = q_size + 2 * attention.kv_heads * attention.dim
    _pack(control, 1, layer, factors, sites, packs, slots)
    _norm_and_shrink(control, 2, layer, layer.x, layer.input_norm, SITE_QKV, pieces, factors, sites, packs, eps)
    _project(
        control, 3, layer, layer.normed, hidden, layer.qkv_weight, layer.qkv_bias, qkv_size, 0, layer.qkv,
        SITE_QKV, pieces, factors, sites, sample,
    )  # fmt: skip
    _split(control, 4, layer, attention, places, member, eps, scale)
    _attend(control, 5, layer, attention, sequences, items, member)
    _shrink(control, 6, layer, layer.attended, q_size, SITE_O, pieces, factors, sites, packs)
    _project(
        control, 7, layer, layer.attended, q_size, layer.o_weight, layer.o_bias, hidden, layer.x, layer.mid,
        SITE_O, pieces, factors, sites, sample,
    )  # fmt: skip
    _norm_and_shrink(control, 8, layer, layer.mid, layer.mlp_norm, SITE_GATE_UP, pieces, factors, sites, packs, eps)
    _gate_up(control, 9, layer, pieces, factors, sites, sample)
    _shrink(control, 10, layer, layer.active, mlp, SITE_DOWN, pieces, factors, sites, packs)
    _project(
        control, 11, layer, layer.active, mlp, layer.down_weight, layer.down_bias, hidden, layer.mid, layer.out,
        SITE_DOWN, pieces, factors, sites, sample,
    )  # fmt: skip
