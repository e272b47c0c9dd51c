"""A decoder layer for training, backward, as one job of a `Team`.

What is cheap is computed again rather than kept: norms, heads, the activation, the scores. Phases that do not depend on
each other share one number, the larger tasks first, so that members wait for each other eleven times a layer.
"""

from __future__ import annotations

from tenora_kernels.cpu.attention.sequences import QUERIES, attend_family
from tenora_kernels.cpu.attention.split_heads import join_token, split_token
from tenora_kernels.cpu.decoder.layer_arguments import SITE_DOWN, SITE_GATE_UP, SITE_O, SITE_QKV, TOKENS_OF_A_TASK
from tenora_kernels.cpu.lowrank.factors import (
    expand_back,
    gradient_task,
    gradient_tasks,
    pack_outputs,
    shrink_back,
)
from tenora_kernels.cpu.products.gemm import PANEL, group_of, tile_count, tile_of
from tenora_kernels.cpu.products.rowwise import add_row, gate_backward, norm_backward, norm_rows
from tenora_kernels.cpu.products.transposed import multiply_transposed, transpose_task, transpose_tasks
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join

__all__ = ["BACKWARD_PHASES", "backward_layer"]

BACKWARD_PHASES = 12


@compiled()
def _prepare(
    control, phase, layer, attention, places, factors, sites, packs, slots, pieces, member, eps, scale, sample
):  # fmt: skip
    """The four matrices transposed, B of every slot, the heads, and the input of gate and up."""
    hidden, mlp, tokens = layer.hidden, layer.mlp, layer.rows
    q_size = layer.head_count * attention.dim
    qkv_panels = (q_size + 2 * attention.kv_heads * attention.dim) // PANEL
    buffer = attention.scores + member * 2 * QUERIES * attention.scores_row * 4
    down = transpose_tasks(hidden // PANEL)
    gate_up = down + transpose_tasks(2 * mlp // PANEL)
    o = gate_up + transpose_tasks(hidden // PANEL)
    qkv = o + transpose_tasks(qkv_panels)
    factor = qkv + sites.shape[0] * layer.slots
    token_tasks = (tokens + TOKENS_OF_A_TASK - 1) // TOKENS_OF_A_TASK
    heads = factor + token_tasks
    tasks = heads + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < down:
            transpose_task(task, layer.down_weight, 0, hidden // PANEL, mlp, layer.transposed_down, sample)
        elif task < gate_up:
            transpose_task(
                task - down, layer.gate_up_weight, 0, 2 * mlp // PANEL, hidden, layer.transposed_gate_up, sample
            )
        elif task < o:
            transpose_task(task - gate_up, layer.o_weight, 0, hidden // PANEL, q_size, layer.transposed_o, sample)
        elif task < qkv:
            transpose_task(task - o, layer.qkv_weight, 0, qkv_panels, hidden, layer.transposed_qkv, sample)
        elif task < factor:
            pack_outputs(task - qkv, factors, sites, packs, slots, layer.index)
        elif task < heads:
            first = (task - factor) * TOKENS_OF_A_TASK
            for token in range(first, min(tokens, first + TOKENS_OF_A_TASK)):
                split_token(attention, token, places[token], True, eps, scale, buffer)
        else:
            norm_rows(pieces[task - heads], layer.mid, layer.mlp_norm, hidden, eps, layer.normed)
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
            pieces[task], factors, sites, SITE_DOWN, packs, layer.index, layer.d_out, layer.hidden * 4, layer.ds
        )
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _gate_slopes(layer, start, stop, first, last):
    """ACTIVE, and D_GATE_UP from the gradient of ACTIVE that stands in its gate's half."""
    mlp = layer.mlp
    step, columns = 2 * mlp * 4, last - first
    for row in range(start, stop):
        gate = layer.gate_up + row * step + first * 4
        slope = layer.d_gate_up + row * step + first * 4
        active = layer.active + (row * mlp + first) * 4
        gate_backward(gate, gate + mlp * 4, slope, columns, layer.activation, active, slope, slope + mlp * 4)


@compiled()
def _product_task(
    task, layer, dy, depth, transposed, columns, out, out_step, number, pieces, factors, sites, sample
):  # fmt: skip
    """out = dY · W + dS · A for some rows and columns."""
    panels = columns // PANEL
    start, stop, first, last = tile_of(task, layer.rows, panels, group_of(panels))
    multiply_transposed(
        dy + start * depth * 4, depth * 4, stop - start, transposed, first, last, depth, out + start * out_step,
        out_step, 0, sample,
    )  # fmt: skip
    expand_back(
        pieces, start, stop, first * PANEL, last * PANEL, factors, sites, number, layer.index, layer.ds, out, out_step
    )
    if number == SITE_DOWN:
        _gate_slopes(layer, start, stop, first * PANEL, last * PANEL)


@compiled()
def _product_tasks(layer, columns):
    panels = columns // PANEL
    return tile_count(layer.rows, panels, group_of(panels))


@compiled()
def _product(
    control, phase, layer, dy, depth, transposed, columns, out, out_step, number, pieces, factors, sites, sample
):
    tasks = _product_tasks(layer, columns)
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        _product_task(
            task, layer, dy, depth, transposed, columns, out, out_step, number, pieces, factors, sites, sample
        )
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _sum_tasks(layer, factors, sites, number):
    """How many tasks the weight gradients of a site have."""
    return layer.slots * gradient_tasks(sites, number) if factors.grad != 0 else 0


@compiled()
def _after_active(control, phase, layer, factors, sites, packs, slots, pieces, runs, bounds):
    """dS of gate and up; gradients of down's factors."""
    sums, hidden, mlp = _sum_tasks(layer, factors, sites, SITE_DOWN), layer.hidden, layer.mlp
    tasks = sums + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < sums:
            gradient_task(
                task, factors, sites, SITE_DOWN, runs, bounds, slots, layer.index, layer.active, mlp * 4,
                layer.d_out, hidden * 4, layer.s, layer.ds,
            )  # fmt: skip
        else:
            shrink_back(
                pieces[task - sums], factors, sites, SITE_GATE_UP, packs, layer.index, layer.d_gate_up, 2 * mlp * 4,
                layer.ds,
            )  # fmt: skip
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _after_mlp(control, phase, layer, factors, sites, packs, slots, pieces, runs, bounds, eps):
    """D_MID and dS of o; gradients of gate's and up's factors."""
    sums, hidden, mlp = _sum_tasks(layer, factors, sites, SITE_GATE_UP), layer.hidden, layer.mlp
    tasks = sums + pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < sums:
            gradient_task(
                task, factors, sites, SITE_GATE_UP, runs, bounds, slots, layer.index, layer.normed, hidden * 4,
                layer.d_gate_up, 2 * mlp * 4, layer.s, layer.ds,
            )  # fmt: skip
        else:
            piece = pieces[task - sums]
            _norm_slopes(layer, piece, layer.mid, layer.mlp_norm, layer.d_out, layer.d_mid, eps)
            shrink_back(piece, factors, sites, SITE_O, packs, layer.index, layer.d_mid, hidden * 4, layer.ds)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _norm_slopes(layer, piece, x, weight, residual, out, eps):
    """out = residual + the gradient of x, from D_NORMED."""
    columns = layer.hidden
    for row in range(piece[1], piece[1] + piece[2]):
        at = row * columns * 4
        norm_backward(x + at, weight, layer.d_normed + at, columns, eps, out + at)
        add_row(out + at, residual + at, columns, out + at)


@compiled()
def _attend_back(
    control, phase, layer, attention, sequences, members, families, factors, sites, slots, pieces, runs, bounds, member,
    eps, scale,
):  # fmt: skip
    """DQ, DK and DV; gradients of o's factors; the input of q, k and v once more."""
    heads, hidden = layer.head_count, layer.hidden
    q_size = heads * attention.dim
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
                task - attending, factors, sites, SITE_O, runs, bounds, slots, layer.index, layer.attended,
                q_size * 4, layer.d_mid, hidden * 4, layer.s, layer.ds,
            )  # fmt: skip
        else:
            norm_rows(pieces[task - sums], layer.x, layer.input_norm, hidden, eps, layer.normed)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _join_heads(control, phase, layer, attention, factors, sites, packs, pieces, member, eps):
    """D_QKV and dS of q, k and v."""
    step = (layer.head_count + 2 * attention.kv_heads) * attention.dim * 4
    buffer = attention.scores + member * 2 * QUERIES * attention.scores_row * 4
    tasks = pieces.shape[0]
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        piece = pieces[task]
        for token in range(piece[1], piece[1] + piece[2]):
            join_token(attention, token, eps, buffer)
        shrink_back(piece, factors, sites, SITE_QKV, packs, layer.index, layer.d_qkv, step, layer.ds)
        complete(control, phase)
    join(control, phase, tasks)


@compiled()
def _after_heads(control, phase, layer, qkv_size, factors, sites, slots, pieces, runs, bounds, sample):
    """Gradients of q's, k's and v's factors; D_NORMED of their input if it is wanted."""
    hidden = layer.hidden
    products = _product_tasks(layer, hidden) if layer.dx != 0 else 0
    tasks = products + _sum_tasks(layer, factors, sites, SITE_QKV)
    while True:
        task = claim(control, phase, tasks)
        if task < 0:
            break
        if task < products:
            _product_task(
                task, layer, layer.d_qkv, qkv_size, layer.transposed_qkv, hidden, layer.d_normed, hidden * 4, SITE_QKV,
                pieces, factors, sites, sample,
            )  # fmt: skip
        else:
            gradient_task(
                task - products, factors, sites, SITE_QKV, runs, bounds, slots, layer.index, layer.normed,
                hidden * 4, layer.d_qkv, qkv_size * 4, layer.s, layer.ds,
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
        _norm_slopes(layer, pieces[task], layer.x, layer.input_norm, layer.d_mid, layer.dx, eps)
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
        layer: `layer_arguments.BACKWARD` [1].
        attention, sequences, places, factors, sites, packs, slots, pieces: as in `layer_forward.forward_layer`.
        members, families: int64 [sequences], [n + 1]: family i is members[families[i]:families[i + 1]].
        runs, bounds: see `factors.gradient_task`.
        eps, scale, sample: as in `layer_forward.forward_layer`.
    """
    layer, attention, factors = layer[0], attention[0], factors[0]
    member = max(0, claim(control, 0, layer.members))
    hidden, mlp, q_size = layer.hidden, layer.mlp, layer.head_count * attention.dim
    qkv_size = q_size + 2 * attention.kv_heads * attention.dim
    _prepare(control, 1, layer, attention, places, factors, sites, packs, slots, pieces, member, eps, scale, sample)
    _shrink_down(control, 2, layer, factors, sites, packs, pieces)
    _product(
        control, 3, layer, layer.d_out, hidden, layer.transposed_down, mlp, layer.d_gate_up, 2 * mlp * 4, SITE_DOWN,
        pieces, factors, sites, sample,
    )  # fmt: skip
    _after_active(control, 4, layer, factors, sites, packs, slots, pieces, runs, bounds)
    _product(
        control, 5, layer, layer.d_gate_up, 2 * mlp, layer.transposed_gate_up, hidden, layer.d_normed, hidden * 4,
        SITE_GATE_UP, pieces, factors, sites, sample,
    )  # fmt: skip
    _after_mlp(control, 6, layer, factors, sites, packs, slots, pieces, runs, bounds, eps)
    _product(
        control, 7, layer, layer.d_mid, hidden, layer.transposed_o, q_size, layer.d_attended, q_size * 4, SITE_O,
        pieces, factors, sites, sample,
    )  # fmt: skip
    _attend_back(
        control, 8, layer, attention, sequences, members, families, factors, sites, slots, pieces, runs, bounds,
        member, eps, scale,
    )  # fmt: skip
    _join_heads(control, 9, layer, attention, factors, sites, packs, pieces, member, eps)
    _after_heads(control, 10, layer, qkv_size, factors, sites, slots, pieces, runs, bounds, sample)
    if layer.dx != 0:
        _finish(control, 11, layer, pieces, eps)
