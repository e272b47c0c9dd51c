"""Cross-entropy over a large vocabulary and its gradient, for the rows that have a target, in float32.

The vocabulary goes by in blocks. Forward, a block's scores become e^(score - its largest) where they lie, beside their
sum and their largest; the blocks of a row are then joined in order. Backward, a block is scaled to the gradient of its
scores and multiplied with the same weights the other way, while the next block's weights are transposed. A caller may
do a few blocks at a time, so that the pass can be left in between.

Each row's numbers depend on that row alone.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from tenora_kernels.cpu.attention.sequences import exponentials, largest
from tenora_kernels.cpu.products.gemm import PANEL, group_of, multiply_block, row_blocks, tile_count, tile_of
from tenora_kernels.cpu.products.product import bytes_of
from tenora_kernels.cpu.products.rowwise import norm_backward, norm_forward, scale_row
from tenora_kernels.cpu.products.transposed import multiply_transposed, transpose_task, transpose_tasks
from tenora_kernels.cpu.runtime.arguments import declare
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import load, peek, poke, store
from tenora_kernels.cpu.runtime.vectors import LANES

__all__ = [
    "BLOCK_PANELS", "LOSS", "finish_job", "gather_job", "gradient_job", "loss_job", "score_job",
]  # fmt: skip

BLOCK_PANELS = 48
"""Panels of the vocabulary in a block: 768 columns with AVX2."""

LOSS = declare(
    "rows", "vocabulary", "panels", "hidden_size", "weight", "hidden", "at", "targets", "norm", "normed", "scores",
    "parts", "target_scores", "log_sums", "loss", "right", "coefficients", "d_normed", "transposed", "d_hidden",
)  # fmt: skip
"""Addresses in bytes. scores float32 [rows, panels · PANEL]; parts float32 [blocks, rows, 2], largest score and sum;
target_scores, log_sums, loss, coefficients float32 and right int64 [rows]; normed and d_normed [rows, hidden_size];
transposed: weights of two blocks; hidden and d_hidden [·, hidden_size], of which at (int64 [rows]) names the rows.
coefficients and d_hidden are 0 where nobody wants a gradient.
"""

_ROWS_OF_A_TASK = 16
_I64 = np.int64(0)


@job()
def gather_job(control, calls, eps):
    """NORMED = the final norm of the rows of HIDDEN that AT names. One phase."""
    call = calls[0]
    columns, rows = call.hidden_size, call.rows
    tasks = (rows + _ROWS_OF_A_TASK - 1) // _ROWS_OF_A_TASK
    while True:
        task = claim(control, 0, tasks)
        if task < 0:
            break
        for row in range(task * _ROWS_OF_A_TASK, min(rows, (task + 1) * _ROWS_OF_A_TASK)):
            source = call.hidden + peek(call.at, row, _I64) * columns * 4
            norm_forward(source, call.norm, columns, eps, call.normed + row * columns * 4)
        complete(control, 0)
    join(control, 0, tasks)


@compiled()
def _columns(call, block):
    """First column of a block and how many are of the vocabulary."""
    first = block * BLOCK_PANELS * PANEL
    return first, min(BLOCK_PANELS * PANEL, call.vocabulary - first)


@job()
def score_job(control, calls, first_block, last_block, sample):
    """SCORES, PARTS and TARGET_SCORES of some blocks. One phase."""
    call = calls[0]
    rows, panels, depth = call.rows, call.panels, call.hidden_size
    pieces, step = row_blocks(rows), call.panels * PANEL * 4
    tasks = (last_block - first_block) * pieces
    while True:
        task = claim(control, 0, tasks)
        if task < 0:
            break
        block, piece = first_block + task // pieces, task % pieces
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        first, last = block * BLOCK_PANELS, min(panels, (block + 1) * BLOCK_PANELS)
        multiply_block(
            call.normed + start * depth * 4, depth * 4, stop - start, call.weight, first, last, panels, depth,
            call.scores + start * step, step, 0, sample,
        )  # fmt: skip
        column, count = _columns(call, block)
        for row in range(start, stop):
            at = call.scores + row * step + column * 4
            target = peek(call.targets, row, _I64) - column
            if 0 <= target < count:
                store(call.target_scores, row, load(at, target, float32(0)), float32(0))
            top = largest(at, count)
            part = 2 * (block * rows + row)
            store(call.parts, part, top, float32(0))
            total = exponentials(at, count, (last - first) * PANEL // LANES, top)
            store(call.parts, part + 1, total, float32(0))
        complete(control, 0)
    join(control, 0, tasks)


@job()
def loss_job(control, calls, blocks):
    """LOG_SUMS, LOSS and RIGHT from the parts of all blocks. One phase of one task."""
    call = calls[0]
    if claim(control, 0, 1) == 0:
        rows = call.rows
        for row in range(rows):
            top = load(call.parts, 2 * row, float32(0))
            for block in range(1, blocks):
                top = max(top, load(call.parts, 2 * (block * rows + row), float32(0)))
            total = 0.0
            for block in range(blocks):
                part = 2 * (block * rows + row)
                share = np.exp(np.float64(load(call.parts, part, float32(0)) - top))
                total += share * load(call.parts, part + 1, float32(0))
            score = load(call.target_scores, row, float32(0))
            log_sum = np.float64(top) + np.log(total)
            store(call.log_sums, row, float32(log_sum), float32(0))
            store(call.loss, row, float32(log_sum - score), float32(0))
            poke(call.right, row, 1 if score == top else 0)
        complete(control, 0)
    join(control, 0, 1)


@compiled()
def _slopes(call, block, start, stop):
    """The block's numbers become the gradient of its scores: (softmax - one-hot) · coefficient."""
    rows, step = call.rows, call.panels * PANEL * 4
    column, count = _columns(call, block)
    whole = min(BLOCK_PANELS, call.panels - block * BLOCK_PANELS) * PANEL
    for row in range(start, stop):
        at = call.scores + row * step + column * 4
        coefficient = load(call.coefficients, row, float32(0))
        top = load(call.parts, 2 * (block * rows + row), float32(0))
        factor = coefficient * float32(np.exp(top - load(call.log_sums, row, float32(0))))
        scale_row(at, factor, whole, at)
        target = peek(call.targets, row, _I64) - column
        if 0 <= target < count:
            store(at, target, load(at, target, float32(0)) - coefficient, float32(0))


@compiled()
def _turn(call, block, task, sample):
    panels = min(BLOCK_PANELS, call.panels - block * BLOCK_PANELS)
    out = call.transposed + block % 2 * BLOCK_PANELS * PANEL * call.hidden_size * bytes_of(sample)
    transpose_task(task, call.weight, block * BLOCK_PANELS, panels, call.hidden_size, out, sample)


@job()
def gradient_job(control, calls, first_block, last_block, sample):
    """D_NORMED (+)= the gradient of some blocks' scores times their weights; block 0 overwrites. blocks + 1 phases.

    A phase multiplies one block while it prepares the next one.
    """
    call = calls[0]
    rows, depth, step = call.rows, call.hidden_size, call.panels * PANEL * 4
    out_panels, pieces = depth // PANEL, row_blocks(rows)
    group = group_of(out_panels)
    for phase in range(last_block - first_block + 1):
        block = first_block + phase - 1
        products = tile_count(rows, out_panels, group) if phase > 0 else 0
        more = block + 1 < last_block
        panels = min(BLOCK_PANELS, call.panels - (block + 1) * BLOCK_PANELS)
        turns = transpose_tasks(panels) if more else 0
        tasks = products + turns + (pieces if more else 0)
        while True:
            task = claim(control, phase, tasks)
            if task < 0:
                break
            if task < products:
                start, stop, first, last = tile_of(task, rows, out_panels, group)
                transposed = call.transposed + block % 2 * BLOCK_PANELS * PANEL * depth * bytes_of(sample)
                lines = min(BLOCK_PANELS, call.panels - block * BLOCK_PANELS) * PANEL
                multiply_transposed(
                    call.scores + start * step + block * BLOCK_PANELS * PANEL * 4, step, stop - start, transposed,
                    first, last, lines, call.d_normed + start * depth * 4, depth * 4,
                    1 if block > 0 else 0, sample,
                )  # fmt: skip
            elif task < products + turns:
                _turn(call, block + 1, task - products, sample)
            else:
                piece = task - products - turns
                _slopes(call, block + 1, rows * piece // pieces, rows * (piece + 1) // pieces)
            complete(control, phase)
        join(control, phase, tasks)


@job()
def finish_job(control, calls, eps):
    """D_HIDDEN of the rows that AT names += the gradient through the final norm. One phase of one task, row by row."""
    call = calls[0]
    if claim(control, 0, 1) == 0:
        columns = call.hidden_size
        for row in range(call.rows):
            at = peek(call.at, row, _I64) * columns * 4
            slope = call.d_normed + row * columns * 4
            norm_backward(call.hidden + at, call.norm, slope, columns, eps, call.normed + row * columns * 4)
            for i in range(columns):
                value = load(call.normed + row * columns * 4, i, float32(0))
                store(call.d_hidden + at, i, load(call.d_hidden + at, i, float32(0)) + value, float32(0))
        complete(control, 0)
    join(control, 0, 1)
