"""A decoder layer for training, forward, as one job of a `Team`: what its backward pass needs stays in memory."""

from __future__ import annotations

from numba import float32

from tenora_kernels.cpu.attention.sequences import DIM, KV_HEADS, QUERIES, SCORES, SCORES_ROW, attend_item
from tenora_kernels.cpu.attention.split_heads import split_token
from tenora_kernels.cpu.decoder.layer_record import (
    ACTIVATION,
    ACTIVE,
    ATTENDED,
    DOWN_BIAS,
    DOWN_WEIGHT,
    GATE_UP,
    GATE_UP_BIAS,
    GATE_UP_WEIGHT,
    HEAD_COUNT,
    HIDDEN,
    INDEX,
    INPUT_NORM,
    MEMBERS,
    MID,
    MLP,
    MLP_NORM,
    NORMED,
    O_BIAS,
    O_WEIGHT,
    OUT,
    QKV,
    QKV_BIAS,
    QKV_WEIGHT,
    ROWS,
    SITE_DOWN,
    SITE_GATE_UP,
    SITE_O,
    SITE_QKV,
    SLOTS,
    TOKENS_OF_A_TASK,
    S,
    X,
)
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
    columns = layer[HIDDEN]
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        piece = pieces[task]
        norm_rows(piece, x, weight, columns, eps, layer[NORMED])
        shrink(piece, factors, sites, number, packs, layer[INDEX], layer[NORMED], columns * 4, layer[S])
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
        shrink(pieces[task], factors, sites, number, packs, layer[INDEX], x, columns * 4, layer[S])
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
    rows, panels = layer[ROWS], columns // PANEL
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
            pieces, start, stop, first * PANEL, last * PANEL, factors, sites, number, layer[INDEX], layer[S], out,
            columns * 4,
        )  # fmt: skip
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _gate_up(control, phase, layer, pieces, factors, sites, sample):
    """GATE_UP and ACTIVE; a task makes the same columns of gate and up."""
    rows, mlp, depth = layer[ROWS], layer[MLP], layer[HIDDEN]
    panels = mlp // PANEL
    group = max(2, group_of(panels) // 2)
    tasks, step = tile_count(rows, panels, group), 2 * mlp * 4
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, rows, panels, group)
        at = layer[GATE_UP] + start * step
        for half in range(2):
            low, high = half * panels + first, half * panels + last
            multiply_block(
                layer[NORMED] + start * depth * 4, depth * 4, stop - start, layer[GATE_UP_WEIGHT], low, high,
                2 * panels, depth, at, step, 0, sample,
            )  # fmt: skip
            if layer[GATE_UP_BIAS] != 0:
                add_bias(layer[GATE_UP_BIAS], low * PANEL, high * PANEL, stop - start, at, step)
            expand(
                pieces, start, stop, low * PANEL, high * PANEL, factors, sites, SITE_GATE_UP, layer[INDEX], layer[S],
                layer[GATE_UP], step,
            )  # fmt: skip
        for row in range(start, stop):
            gate = layer[GATE_UP] + row * step + first * PANEL * 4
            active = layer[ACTIVE] + (row * mlp + first * PANEL) * 4
            gate_forward(gate, gate + mlp * 4, (last - first) * PANEL, layer[ACTIVATION], active)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _split(control, phase, layer, attention, places, member, eps, scale):
    tokens = layer[ROWS]
    tasks = (tokens + TOKENS_OF_A_TASK - 1) // TOKENS_OF_A_TASK
    buffer = attention[SCORES] + member * 2 * QUERIES * attention[SCORES_ROW] * 4
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
    heads = layer[HEAD_COUNT]
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
    tasks = 4 * layer[SLOTS]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        pack_inputs(task, factors, sites, packs, slots, layer[INDEX])
        complete(control, phase)
    join(control, phase, tasks)


@job()
def forward_layer(
    control, layer, attention, sequences, items, places, factors, sites, packs, slots, pieces, eps, scale, sample
):  # fmt: skip
    """The job: OUT from X, and everything that is saved on the way.

    Args:
        control: the team's.
        layer: int64 [layer_record.RECORD_SIZE].
        attention, sequences: see `sequences`.
        items: int64 [n, 3]: sequence, first token, number of tokens (at most QUERIES), the longest first.
        places: int64 [T], panel · WIDTH + column of each token's keys.
        factors, sites, packs, slots: see `factors`.
        pieces: int64 [n, 4]: slot (-1: the base), first row, rows, number of the slot in `slots`; all rows, in order.
        eps: of the norms.
        scale: of the scores.
        sample: of the weights, see `gemm`.
    """
    member = max(0, claim(control, 0, layer[MEMBERS]))
    hidden, mlp, q_size = layer[HIDDEN], layer[MLP], layer[HEAD_COUNT] * attention[DIM]
    qkv_size = q_size + 2 * attention[KV_HEADS] * attention[DIM]
    _pack(control, 1, layer, factors, sites, packs, slots)
    _norm_and_shrink(control, 2, layer, layer[X], layer[INPUT_NORM], SITE_QKV, pieces, factors, sites, packs, eps)
    _project(
        control, 3, layer, layer[NORMED], hidden, layer[QKV_WEIGHT], layer[QKV_BIAS], qkv_size, 0, layer[QKV],
        SITE_QKV, pieces, factors, sites, sample,
    )  # fmt: skip
    _split(control, 4, layer, attention, places, member, eps, scale)
    _attend(control, 5, layer, attention, sequences, items, member)
    _shrink(control, 6, layer, layer[ATTENDED], q_size, SITE_O, pieces, factors, sites, packs)
    _project(
        control, 7, layer, layer[ATTENDED], q_size, layer[O_WEIGHT], layer[O_BIAS], hidden, layer[X], layer[MID],
        SITE_O, pieces, factors, sites, sample,
    )  # fmt: skip
    _norm_and_shrink(control, 8, layer, layer[MID], layer[MLP_NORM], SITE_GATE_UP, pieces, factors, sites, packs, eps)
    _gate_up(control, 9, layer, pieces, factors, sites, sample)
    _shrink(control, 10, layer, layer[ACTIVE], mlp, SITE_DOWN, pieces, factors, sites, packs)
    _project(
        control, 11, layer, layer[ACTIVE], mlp, layer[DOWN_WEIGHT], layer[DOWN_BIAS], hidden, layer[MID], layer[OUT],
        SITE_DOWN, pieces, factors, sites, sample,
    )  # fmt: skip
