"""What follows the products of a step, row by row: biases, and the epilogues of the adapters that have one.

An epilogue is an output scale, y ← g ∘ y for the columns of a module, or a bottleneck behind a block, y ← y + s · (U ·
f(D · x + b) + c) where x is y, the residual stream, or both added. A row's arithmetic is decided by its own adapter.
Rows whose adapter has an epilogue come last in the batch. While their blocks run, the place of their hidden state holds
the block's output alone, and `end_block` adds the residual.
"""

from __future__ import annotations

import numpy as np
from numba import float32, uint16

from tenora_kernels.cpu.decoder.activation import curve
from tenora_kernels.cpu.lowrank.factors import COUNT, MODULE, SLICES
from tenora_kernels.cpu.lowrank.lora_blocks import expand_rows, shrink_rows
from tenora_kernels.cpu.lowrank.lowrank import factor_of, second_factor
from tenora_kernels.cpu.products.gemm import add_bias
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.team import claim, complete, join
from tenora_kernels.cpu.runtime.values import load, peek, size_of, store
from tenora_kernels.flags import ACTIVATION_BITS, BIAS_OUTSIDE, PARALLEL, WITH_RESIDUAL

__all__ = ["copy_row", "end_block", "finish_rows"]

_I64 = np.int64(0)


@compiled()
def copy_row(source, columns, out):
    """out = source, float32."""
    for i in range(columns):
        store(out, i, load(source, i, float32(0)), float32(0))


@compiled()
def _scale(y, columns, factors, sample):
    for i in range(columns):
        store(y, i, load(y, i, float32(0)) * load(factors, i, sample), float32(0))


@compiled()
def _scale_columns(lora, row, slot, y, columns, skipped):
    """y[0:columns] ∘= what follows the first `skipped` numbers of a vector in the tables, if the slot has it."""
    rank, size, factors = factor_of(lora, row, slot)
    if rank > 0 and size == 2:
        _scale(y, columns, factors + 2 * skipped, uint16(0))
    elif rank > 0:
        _scale(y, columns, factors + 4 * skipped, float32(0))


@compiled()
def finish_rows(start, stop, low, high, step, lora, before, site, out, out_step, bias):
    """Bias and scale of the rows start … stop - 1 and columns low … high - 1 of a site's finished product at `out`.

    before: modules of the layers below. bias: address of float32, of all the site's columns; 0 for none.
    """
    middle = min(max(step.plain_rows, start), stop)
    if bias != 0:
        add_bias(bias, low, high, middle - start, out + start * out_step, out_step)
    for row in range(middle, stop):
        slot, y = peek(step.slots_of_rows, row, _I64), out + row * out_step
        outside = peek(lora.flags, slot, _I64) & BIAS_OUTSIDE
        if bias != 0 and not outside:
            add_bias(bias, low, high, 1, y, out_step)
        for j in range(site[COUNT]):
            first, width = site[SLICES + 2 * j], site[SLICES + 2 * j + 1]
            left, right = max(low, first), min(high, first + width)
            if left < right:
                module = step.scales + before + site[MODULE] + j
                _scale_columns(lora, module, slot, y + 4 * left, right - left, left - first)
        if bias != 0 and outside:
            add_bias(bias, low, high, 1, y, out_step)


@compiled()
def _bend(rows, columns, kind, scale, bias, buffer, sample):
    """buffer [rows, columns] = scale · f(buffer + bias)."""
    for row in range(rows):
        at = buffer + row * columns * 4
        for i in range(columns):
            x = load(at, i, float32(0))
            if bias != 0:
                x += load(bias, i, sample)
            store(at, i, scale * curve(x, kind), float32(0))


@compiled()
def _through(
    x, y, columns, index, rows, down, up, width, scale, inner, outer, kind, buffer, ahead, ahead_size, sample
):  # fmt: skip
    """y[i] += scale · (U · f(D · x[i] + inner) + outer) for a piece of one slot, whose row numbers lie at `index`."""
    step = columns * 4
    size = width * columns * size_of(sample)
    shrink_rows(x, step, index, rows, down, columns, width, float32(1), buffer, up, size, float32(0), sample)
    _bend(rows, width, kind, scale, inner, buffer, sample)
    expand_rows(
        buffer, width * 4, 4, rows, width, up, columns * size_of(sample), columns, y, step, index, ahead, ahead_size,
        float32(0), sample,
    )  # fmt: skip
    if outer != 0:
        for row in range(rows):
            at = y + peek(index, row, _I64) * step
            for i in range(columns):
                store(at, i, load(at, i, float32(0)) + scale * load(outer, i, sample), float32(0))


@compiled()
def _vector(lora, row, slot):
    """The address of a vector in the tables; 0 if the slot has none."""
    rank, _, address = factor_of(lora, row, slot)
    return address if rank > 0 else 0


@compiled()
def _after_block(step, first, rows):
    """NORMED = X + RESIDUAL of rows of a piece: the block has read what was there."""
    for row in range(first, first + rows):
        at = row * step.hidden * 4
        residual = step.residual + at - step.plain_rows * step.hidden * 4
        for i in range(step.hidden):
            total = load(residual, i, float32(0)) + load(step.x + at, i, float32(0))
            store(step.normed + at, i, total, float32(0))


@compiled()
def _bottleneck(lora, step, block, slot, first, rows, buffer, ahead, ahead_size):
    """The bottleneck of a piece, on X, where its rows' outputs of the block lie."""
    width, size, down = factor_of(lora, step.bottlenecks + block, slot)
    if width == 0:
        return
    up, scale = second_factor(lora, step.bottlenecks + block, slot, size)
    flags = peek(lora.flags, slot, _I64)
    x = step.x
    if flags & PARALLEL:
        x = step.residual - step.plain_rows * step.hidden * 4
    elif flags & WITH_RESIDUAL:
        _after_block(step, first, rows)
        x = step.normed
    inner = _vector(lora, step.inner_biases + block, slot)
    outer = _vector(lora, step.outer_biases + block, slot)
    kind, index = flags & ACTIVATION_BITS, step.numbers + 8 * first
    if size == 2:
        _through(x, step.x, step.hidden, index, rows, down, up, width, scale, inner, outer, kind, buffer, ahead,
                 ahead_size, uint16(0))  # fmt: skip
    else:
        _through(x, step.x, step.hidden, index, rows, down, up, width, scale, inner, outer, kind, buffer, ahead,
                 ahead_size, float32(0))  # fmt: skip


@compiled()
def end_block(control, phase, step, lora, adapted, block, buffer):
    """A phase: rows with an epilogue go through the block's bottleneck, if their adapter has one; X += RESIDUAL.

    A member claims its next task before it does the one at hand, whose arithmetic hides the fetching of that one's D.
    """
    tasks = step.items - step.plain_items
    task = claim(control, phase, tasks)
    while task >= 0:
        following = claim(control, phase, tasks)
        ahead, ahead_size = 0, 0
        if following >= 0:
            width, size, ahead = factor_of(lora, step.bottlenecks + block, adapted[step.plain_items + following, 0])
            ahead_size = width * size * step.hidden
        slot, first, rows = adapted[step.plain_items + task]
        _bottleneck(lora, step, block, slot, first, rows, buffer, ahead, ahead_size)
        for row in range(first, first + rows):
            x, residual = step.x + row * step.hidden * 4, step.residual + (row - step.plain_rows) * step.hidden * 4
            for i in range(step.hidden):
                store(x, i, load(residual, i, float32(0)) + load(x, i, float32(0)), float32(0))
        complete(control, phase)
        task = following
    join(control, phase, tasks)
