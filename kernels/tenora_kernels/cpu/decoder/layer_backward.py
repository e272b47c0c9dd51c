"""A decoder layer for training, backward, as one job of a `Team`.

What is cheap is computed again rather than kept: norms, heads, the activation, the scores. Phases that do not depend on
each other share one number, the larger tasks first, so that members wait for each other eleven times a layer.
"""

from __future__ import annotations

from tenora_kernels.cpu.attention.sequences import DIM, KV_HEADS, QUERIES, SCORES, SCORES_ROW, attend_family
from tenora_kernels.cpu.attention.split_heads import join_token, split_token
from tenora_kernels.cpu.decoder.layer_record import (
    ACTIVATION,
    ACTIVE,
    ATTENDED,
    D_ATTENDED,
    D_GATE_UP,
    D_MID,
    D_NORMED,
    D_OUT,
    D_QKV,
    DOWN_WEIGHT,
    DS,
    DX,
    GATE_UP,
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
    O_WEIGHT,
    QKV_WEIGHT,
    ROWS,
    SITE_DOWN,
    SITE_GATE_UP,
    SITE_O,
    SITE_QKV,
    SLOTS,
    TOKENS_OF_A_TASK,
    TURNED_DOWN,
    TURNED_GATE_UP,
    TURNED_O,
    TURNED_QKV,
    S,
    X,
)
from tenora_kernels.cpu.lowrank.factors import (
    GRAD,
    expand_back,
    gradient_task,
    gradient_tasks,
    pack_outputs,
    shrink_back,
)
from tenora_kernels.cpu.products.gemm import PANEL, group_of, tile_count, tile_of
from tenora_kernels.cpu.products.rowwise import add_row, gate_backward, norm_backward, norm_rows
from tenora_kernels.cpu.products.transposed import multiply_turned, transpose_task, transpose_tasks
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join

__all__ = ["BACKWARD_PHASES", "backward_layer"]

BACKWARD_PHASES = 12


@compiled()
def _prepare(
    control, phase, layer, attention, places, factors, sites, packs, slots, pieces, member, eps, scale, sample
):  # fmt: skip
    """The four matrices turned, B of every slot, the heads, and the input of gate and up."""
    hidden, mlp, tokens = layer[HIDDEN], layer[MLP], layer[ROWS]
    q_size = layer[HEAD_COUNT] * attention[DIM]
    qkv_panels = (q_size + 2 * attention[KV_HEADS] * attention[DIM]) // PANEL
    buffer = attention[SCORES] + member * 2 * QUERIES * attention[SCORES_ROW] * 4
    down = transpose_tasks(hidden // PANEL)
    gate_up = down + transpose_tasks(2 * mlp // PANEL)
    o = gate_up + transpose_tasks(hidden // PANEL)
    qkv = o + transpose_tasks(qkv_panels)
    factor = qkv + 4 * layer[SLOTS]
    token_tasks = (tokens + TOKENS_OF_A_TASK - 1) // TOKENS_OF_A_TASK
    heads = factor + token_tasks
    tasks = heads + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < down:
            transpose_task(task, layer[DOWN_WEIGHT], 0, hidden // PANEL, mlp, layer[TURNED_DOWN], sample)
        elif task < gate_up:
            transpose_task(
                task - down, layer[GATE_UP_WEIGHT], 0, 2 * mlp // PANEL, hidden, layer[TURNED_GATE_UP], sample
            )
        elif task < o:
            transpose_task(task - gate_up, layer[O_WEIGHT], 0, hidden // PANEL, q_size, layer[TURNED_O], sample)
        elif task < qkv:
            transpose_task(task - o, layer[QKV_WEIGHT], 0, qkv_panels, hidden, layer[TURNED_QKV], sample)
        elif task < factor:
            pack_outputs(task - qkv, factors, sites, packs, slots, layer[INDEX])
        elif task < heads:
            first = (task - factor) * TOKENS_OF_A_TASK
            for token in range(first, min(tokens, first + TOKENS_OF_A_TASK)):
                split_token(attention, token, places[token], True, eps, scale, buffer)
        else:
            norm_rows(pieces[task - heads], layer[MID], layer[MLP_NORM], hidden, eps, layer[NORMED])
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _shrink_down(control, phase, layer, factors, sites, packs, pieces):
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        shrink_back(
            pieces[task], factors, sites, SITE_DOWN, packs, layer[INDEX], layer[D_OUT], layer[HIDDEN] * 4, layer[DS]
        )
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _gate_slopes(layer, start, stop, first, last):
    """ACTIVE, and D_GATE_UP from the gradient of ACTIVE that stands in its gate's half."""
    mlp = layer[MLP]
    step, columns = 2 * mlp * 4, last - first
    for row in range(start, stop):
        gate = layer[GATE_UP] + row * step + first * 4
        slope = layer[D_GATE_UP] + row * step + first * 4
        active = layer[ACTIVE] + (row * mlp + first) * 4
        gate_backward(gate, gate + mlp * 4, slope, columns, layer[ACTIVATION], active, slope, slope + mlp * 4)


@compiled()
def _product_task(
    task, layer, dy, depth, turned, columns, out, out_step, number, pieces, factors, sites, sample
):  # fmt: skip
    """out = dY · W + dS · A for some rows and columns."""
    panels = columns // PANEL
    start, stop, first, last = tile_of(task, layer[ROWS], panels, group_of(panels))
    multiply_turned(
        dy + start * depth * 4, depth * 4, stop - start, turned, first, last, depth, out + start * out_step, out_step,
        0, sample,
    )  # fmt: skip
    expand_back(
        pieces, start, stop, first * PANEL, last * PANEL, factors, sites, number, layer[INDEX], layer[DS], out, out_step
    )
    if number == SITE_DOWN:
        _gate_slopes(layer, start, stop, first * PANEL, last * PANEL)


@compiled()
def _product_tasks(layer, columns):
    panels = columns // PANEL
    return tile_count(layer[ROWS], panels, group_of(panels))


@compiled()
def _product(control, phase, layer, dy, depth, turned, columns, out, out_step, number, pieces, factors, sites, sample):
    tasks = _product_tasks(layer, columns)
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        _product_task(task, layer, dy, depth, turned, columns, out, out_step, number, pieces, factors, sites, sample)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _sum_tasks(layer, factors, sites, number):
    """How many tasks the weight gradients of a site have."""
    return layer[SLOTS] * gradient_tasks(sites, number) if factors[GRAD] != 0 else 0


@compiled()
def _after_active(control, phase, layer, factors, sites, packs, slots, pieces, runs, bounds):
    """dS of gate and up; gradients of down's factors."""
    sums, hidden, mlp = _sum_tasks(layer, factors, sites, SITE_DOWN), layer[HIDDEN], layer[MLP]
    tasks = sums + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < sums:
            gradient_task(
                task, factors, sites, SITE_DOWN, runs, bounds, slots, layer[INDEX], layer[ACTIVE], mlp * 4,
                layer[D_OUT], hidden * 4, layer[S], layer[DS],
            )  # fmt: skip
        else:
            shrink_back(
                pieces[task - sums], factors, sites, SITE_GATE_UP, packs, layer[INDEX], layer[D_GATE_UP], 2 * mlp * 4,
                layer[DS],
            )  # fmt: skip
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _after_mlp(control, phase, layer, factors, sites, packs, slots, pieces, runs, bounds, eps):
    """D_MID and dS of o; gradients of gate's and up's factors."""
    sums, hidden, mlp = _sum_tasks(layer, factors, sites, SITE_GATE_UP), layer[HIDDEN], layer[MLP]
    tasks = sums + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < sums:
            gradient_task(
                task, factors, sites, SITE_GATE_UP, runs, bounds, slots, layer[INDEX], layer[NORMED], hidden * 4,
                layer[D_GATE_UP], 2 * mlp * 4, layer[S], layer[DS],
            )  # fmt: skip
        else:
            piece = pieces[task - sums]
            _norm_slopes(layer, piece, layer[MID], layer[MLP_NORM], layer[D_OUT], layer[D_MID], eps)
            shrink_back(piece, factors, sites, SITE_O, packs, layer[INDEX], layer[D_MID], hidden * 4, layer[DS])
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _norm_slopes(layer, piece, x, weight, residual, out, eps):
    """out = residual + the gradient of x, from D_NORMED."""
    columns = layer[HIDDEN]
    for row in range(piece[1], piece[1] + piece[2]):
        at = row * columns * 4
        norm_backward(x + at, weight, layer[D_NORMED] + at, columns, eps, out + at)
        add_row(out + at, residual + at, columns, out + at)


@compiled()
def _attend_back(
    control, phase, layer, attention, sequences, members, families, factors, sites, slots, pieces, runs, bounds, member,
    eps, scale,
):  # fmt: skip
    """DQ, DK and DV; gradients of o's factors; the input of q, k and v once more."""
    heads, hidden = layer[HEAD_COUNT], layer[HIDDEN]
    q_size = heads * attention[DIM]
    attending = (families.shape[0] - 1) * heads
    sums = attending + _sum_tasks(layer, factors, sites, SITE_O)
    tasks = sums + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < attending:
            family = task // heads
            attend_family(
                attention, sequences, members, families[family], families[family + 1], task % heads, scale, member
            )
        elif task < sums:
            gradient_task(
                task - attending, factors, sites, SITE_O, runs, bounds, slots, layer[INDEX], layer[ATTENDED],
                q_size * 4, layer[D_MID], hidden * 4, layer[S], layer[DS],
            )  # fmt: skip
        else:
            norm_rows(pieces[task - sums], layer[X], layer[INPUT_NORM], hidden, eps, layer[NORMED])
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _join_heads(control, phase, layer, attention, factors, sites, packs, pieces, member, eps):
    """D_QKV and dS of q, k and v."""
    step = (layer[HEAD_COUNT] + 2 * attention[KV_HEADS]) * attention[DIM] * 4
    buffer = attention[SCORES] + member * 2 * QUERIES * attention[SCORES_ROW] * 4
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        piece = pieces[task]
        for token in range(piece[1], piece[1] + piece[2]):
            join_token(attention, token, eps, buffer)
        shrink_back(piece, factors, sites, SITE_QKV, packs, layer[INDEX], layer[D_QKV], step, layer[DS])
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _after_heads(control, phase, layer, qkv_size, factors, sites, slots, pieces, runs, bounds, sample):
    """Gradients of q's, k's and v's factors; D_NORMED of their input if it is wanted."""
    hidden = layer[HIDDEN]
    products = _product_tasks(layer, hidden) if layer[DX] != 0 else 0
    tasks = products + _sum_tasks(layer, factors, sites, SITE_QKV)
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < products:
            _product_task(
                task, layer, layer[D_QKV], qkv_size, layer[TURNED_QKV], hidden, layer[D_NORMED], hidden * 4, SITE_QKV,
                pieces, factors, sites, sample,
            )  # fmt: skip
        else:
            gradient_task(
                task - products, factors, sites, SITE_QKV, runs, bounds, slots, layer[INDEX], layer[NORMED],
                hidden * 4, layer[D_QKV], qkv_size * 4, layer[S], layer[DS],
            )  # fmt: skip
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _finish(control, phase, layer, pieces, eps):
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        _norm_slopes(layer, pieces[task], layer[X], layer[INPUT_NORM], layer[D_MID], layer[DX], eps)
        complete(control, phase)
    join(control, phase, tasks)


@job()
def backward_layer(
    control, layer, attention, sequences, members, families, places, factors, sites, packs, slots, pieces, runs, bounds,
    eps, scale, sample,
):  # fmt: skip
    """The job: DX (if it is not 0) from D_OUT, and dA and dBᵀ of every slot added to the gradient.

    Args:
        control: the team's.
        layer, attention, sequences, places, factors, sites, packs, slots, pieces: as in `layer_forward.forward_layer`.
        members, families: int64 [sequences], [n + 1]: family i is members[families[i]:families[i + 1]].
        runs, bounds: see `factors.gradient_task`.
        eps, scale, sample: as in `layer_forward.forward_layer`.
    """
    member = max(0, claim(control, 0, layer[MEMBERS]))
    hidden, mlp, q_size = layer[HIDDEN], layer[MLP], layer[HEAD_COUNT] * attention[DIM]
    qkv_size = q_size + 2 * attention[KV_HEADS] * attention[DIM]
    _prepare(control, 1, layer, attention, places, factors, sites, packs, slots, pieces, member, eps, scale, sample)
    _shrink_down(control, 2, layer, factors, sites, packs, pieces)
    _product(
        control, 3, layer, layer[D_OUT], hidden, layer[TURNED_DOWN], mlp, layer[D_GATE_UP], 2 * mlp * 4, SITE_DOWN,
        pieces, factors, sites, sample,
    )  # fmt: skip
    _after_active(control, 4, layer, factors, sites, packs, slots, pieces, runs, bounds)
    _product(
        control, 5, layer, layer[D_GATE_UP], 2 * mlp, layer[TURNED_GATE_UP], hidden, layer[D_NORMED], hidden * 4,
        SITE_GATE_UP, pieces, factors, sites, sample,
    )  # fmt: skip
    _after_mlp(control, 6, layer, factors, sites, packs, slots, pieces, runs, bounds, eps)
    _product(
        control, 7, layer, layer[D_MID], hidden, layer[TURNED_O], q_size, layer[D_ATTENDED], q_size * 4, SITE_O,
        pieces, factors, sites, sample,
    )  # fmt: skip
    _attend_back(
        control, 8, layer, attention, sequences, members, families, factors, sites, slots, pieces, runs, bounds,
        member, eps, scale,
    )  # fmt: skip
    _join_heads(control, 9, layer, attention, factors, sites, packs, pieces, member, eps)
    _after_heads(control, 10, layer, qkv_size, factors, sites, slots, pieces, runs, bounds, sample)
    if layer[DX] != 0:
        _finish(control, 11, layer, pieces, eps)
