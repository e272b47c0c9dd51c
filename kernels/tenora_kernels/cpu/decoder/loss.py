"""Cross-entropy over a large vocabulary and its gradient, for the rows that have a target, in float32.

The vocabulary goes by in blocks. Forward, a block's scores become e^(score - its largest) where they lie, beside their
sum and their largest; the blocks of a row are then joined in order. Backward, a block is scaled to the gradient of its
scores and multiplied with the same weights the other way, while the next block's weights are turned. A caller may do a
few blocks at a time, so that the pass can be left in between.

Each row's numbers depend on that row alone.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from tenora_kernels.cpu.attention.sequences import exponentials, largest
from tenora_kernels.cpu.products.gemm import PANEL, group_of, multiply_block, row_blocks, tile_count, tile_of
from tenora_kernels.cpu.products.product import bytes_of
from tenora_kernels.cpu.products.rowwise import norm_backward, norm_forward, scale_row
from tenora_kernels.cpu.products.transposed import multiply_turned, transpose_task, transpose_tasks
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import load, peek, poke, store
from tenora_kernels.cpu.runtime.vectors import LANES

__all__ = [
    "BLOCK_PANELS", "LOSS_SIZE", "finish_job", "gather_job", "gradient_job", "loss_job", "score_job",
]  # fmt: skip

BLOCK_PANELS = 48
"""Panels of the vocabulary in a block: 768 columns with AVX2."""

# Places in the array `call`. Addresses in bytes. SCORES float32 [ROWS, PANELS · PANEL]; PARTS float32 [blocks, ROWS,
# 2], largest score and sum; TARGET_SCORES, LOG_SUMS, LOSS, COEFFICIENTS float32 and RIGHT int64 [ROWS]; NORMED and
# D_NORMED [ROWS, HIDDEN_SIZE]; TURNED: weights of two blocks; HIDDEN and D_HIDDEN [·, HIDDEN_SIZE], of which AT (int64
# [ROWS]) names the rows.
(
    ROWS, VOCABULARY, PANELS, HIDDEN_SIZE, WEIGHT, HIDDEN, AT, TARGETS, NORM, NORMED, SCORES, PARTS, TARGET_SCORES,
    LOG_SUMS, LOSS, RIGHT, COEFFICIENTS, D_NORMED, TURNED, D_HIDDEN, LOSS_SIZE,
) = range(21)  # fmt: skip

_ROWS_OF_A_TASK = 16
_I64 = np.int64(0)


@job()
def gather_job(control, call, eps):
    """NORMED = the final norm of the rows of HIDDEN that AT names. One phase."""
    columns, rows = call[HIDDEN_SIZE], call[ROWS]
    tasks = (rows + _ROWS_OF_A_TASK - 1) // _ROWS_OF_A_TASK
    while True:
        task = claim(control, 0, tasks)
        if task < 0:
            break
        for row in range(task * _ROWS_OF_A_TASK, min(rows, (task + 1) * _ROWS_OF_A_TASK)):
            source = call[HIDDEN] + peek(call[AT], row, _I64) * columns * 4
            norm_forward(source, call[NORM], columns, eps, call[NORMED] + row * columns * 4)
        complete(control, 0)
    join(control, 0, tasks)


@compiled()
def _columns(call, block):
    """First column of a block and how many are of the vocabulary."""
    first = block * BLOCK_PANELS * PANEL
    return first, min(BLOCK_PANELS * PANEL, call[VOCABULARY] - first)


@job()
def score_job(control, call, first_block, last_block, sample):
    """SCORES, PARTS and TARGET_SCORES of some blocks. One phase."""
    rows, panels, depth = call[ROWS], call[PANELS], call[HIDDEN_SIZE]
    pieces, step = row_blocks(rows), call[PANELS] * PANEL * 4
    tasks = (last_block - first_block) * pieces
    while True:
        task = claim(control, 0, tasks)
        if task < 0:
            break
        block, piece = first_block + task // pieces, task % pieces
        start, stop = rows * piece // pieces, rows * (piece + 1) // pieces
        first, last = block * BLOCK_PANELS, min(panels, (block + 1) * BLOCK_PANELS)
        multiply_block(
            call[NORMED] + start * depth * 4, depth * 4, stop - start, call[WEIGHT], first, last, panels, depth,
            call[SCORES] + start * step, step, 0, sample,
        )  # fmt: skip
        column, count = _columns(call, block)
        for row in range(start, stop):
            at = call[SCORES] + row * step + column * 4
            target = peek(call[TARGETS], row, _I64) - column
            if 0 <= target < count:
                store(call[TARGET_SCORES], row, load(at, target, float32(0)), float32(0))
            top = largest(at, count)
            part = 2 * (block * rows + row)
            store(call[PARTS], part, top, float32(0))
            total = exponentials(at, count, (last - first) * PANEL // LANES, top)
            store(call[PARTS], part + 1, total, float32(0))
        complete(control, 0)
    join(control, 0, tasks)


@job()
def loss_job(control, call, blocks):
    """LOG_SUMS, LOSS and RIGHT from the parts of all blocks. One phase of one task."""
    if claim(control, 0, 1) == 0:
        rows = call[ROWS]
        for row in range(rows):
            top = load(call[PARTS], 2 * row, float32(0))
            for block in range(1, blocks):
                top = max(top, load(call[PARTS], 2 * (block * rows + row), float32(0)))
            total = 0.0
            for block in range(blocks):
                part = 2 * (block * rows + row)
                share = np.exp(np.float64(load(call[PARTS], part, float32(0)) - top))
                total += share * load(call[PARTS], part + 1, float32(0))
            score = load(call[TARGET_SCORES], row, float32(0))
            log_sum = np.float64(top) + np.log(total)
            store(call[LOG_SUMS], row, float32(log_sum), float32(0))
            store(call[LOSS], row, float32(log_sum - score), float32(0))
            poke(call[RIGHT], row, 1 if score == top else 0)
        complete(control, 0)
    join(control, 0, 1)


@compiled()
def _slopes(call, block, start, stop):
    """The block's numbers become the gradient of its scores: (softmax - one-hot) · coefficient."""
    rows, step = call[ROWS], call[PANELS] * PANEL * 4
    column, count = _columns(call, block)
    whole = min(BLOCK_PANELS, call[PANELS] - block * BLOCK_PANELS) * PANEL
    for row in range(start, stop):
        at = call[SCORES] + row * step + column * 4
        coefficient = load(call[COEFFICIENTS], row, float32(0))
        top = load(call[PARTS], 2 * (block * rows + row), float32(0))
        factor = coefficient * float32(np.exp(top - load(call[LOG_SUMS], row, float32(0))))
        scale_row(at, factor, whole, at)
        target = peek(call[TARGETS], row, _I64) - column
        if 0 <= target < count:
            store(at, target, load(at, target, float32(0)) - coefficient, float32(0))


@compiled()
def _turn(call, block, task, sample):
    panels = min(BLOCK_PANELS, call[PANELS] - block * BLOCK_PANELS)
    out = call[TURNED] + block % 2 * BLOCK_PANELS * PANEL * call[HIDDEN_SIZE] * bytes_of(sample)
    transpose_task(task, call[WEIGHT], block * BLOCK_PANELS, panels, call[HIDDEN_SIZE], out, sample)


@job()
def gradient_job(control, call, first_block, last_block, sample):
    """D_NORMED (+)= the gradient of some blocks' scores times their weights; block 0 overwrites. blocks + 1 phases.

    A phase multiplies one block while it prepares the next one.
    """
    rows, depth, step = call[ROWS], call[HIDDEN_SIZE], call[PANELS] * PANEL * 4
    out_panels, pieces = depth // PANEL, row_blocks(rows)
    group = group_of(out_panels)
    for phase in range(last_block - first_block + 1):
        block = first_block + phase - 1
        products = tile_count(rows, out_panels, group) if phase > 0 else 0
        more = block + 1 < last_block
        panels = min(BLOCK_PANELS, call[PANELS] - (block + 1) * BLOCK_PANELS)
        turns = transpose_tasks(panels) if more else 0
        tasks = products + turns + (pieces if more else 0)
        while True:
            task = claim(control, phase, tasks)
            if task < 0:
                break
            if task < products:
                start, stop, first, last = tile_of(task, rows, out_panels, group)
                turned = call[TURNED] + block % 2 * BLOCK_PANELS * PANEL * depth * bytes_of(sample)
                lines = min(BLOCK_PANELS, call[PANELS] - block * BLOCK_PANELS) * PANEL
                multiply_turned(
                    call[SCORES] + start * step + block * BLOCK_PANELS * PANEL * 4, step, stop - start, turned, first,
                    last, lines, call[D_NORMED] + start * depth * 4, depth * 4,
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
def finish_job(control, call, eps):
    """D_HIDDEN of the rows that AT names += the gradient through the final norm. One phase of one task, row by row."""
    if claim(control, 0, 1) == 0:
        columns = call[HIDDEN_SIZE]
        for row in range(call[ROWS]):
            at = peek(call[AT], row, _I64) * columns * 4
            slope = call[D_NORMED] + row * columns * 4
            norm_backward(call[HIDDEN] + at, call[NORM], slope, columns, eps, call[NORMED] + row * columns * 4)
            for i in range(columns):
                value = load(call[NORMED] + row * columns * 4, i, float32(0))
                store(call[D_HIDDEN] + at, i, load(call[D_HIDDEN] + at, i, float32(0)) + value, float32(0))
        complete(control, 0)
    join(control, 0, 1)
