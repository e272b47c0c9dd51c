"""Low-rank terms inside a layer's training job: A and B of every slot of the stream, forward and backward.

With S = x · Aᵀ and dS = c · dY · B per module: y += c · S · Bᵀ, dX += dS · A, dA += dSᵀ · X, dBᵀ += c · Sᵀ · dY. Rows
of the stream go through this in *pieces* of one slot, and sums over rows in *runs* of one slot, in the order of the
stream: what a slot gets depends on its own rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import float32
from numpy.typing import NDArray

from tenora_kernels.cpu.products.strided import ADD, SET, padded, times
from tenora_kernels.cpu.runtime.arguments import declare
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.values import load, peek, store
from tenora_kernels.layout import LoraSite

__all__ = [
    "COUNT", "DEPTH", "FACTORS", "MODULE", "SLICES", "S_COLUMN", "expand", "expand_back", "gradient_task",
    "gradient_tasks", "pack_inputs", "pack_outputs", "shrink", "shrink_back", "site_table",
]  # fmt: skip

FACTORS = declare("ranks", "scaling", "a_offset", "b_offset", "slots", "arena", "grad", "s_step", "times", "modules")
"""The tables of the stream's adapters, addresses in bytes; s_step: bytes from row to row of S and of dS. times:
`times_address()`. modules: of a layer.
"""

# Places in a row of the array `sites`: first module of those of a layer, columns of x, how many modules, the site's
# first column in S, then first column and width in y of each module. A row of the array `packs` holds addresses: of A
# of every site, then of B of every module.
MODULE, DEPTH, COUNT, S_COLUMN, SLICES = range(5)

SUM_ROWS = 96
"""Rows that are summed in registers before they are added to the gradient; their lines stay in the first cache."""

SUM_COLUMNS = 192
"""Columns of the gradient that one task makes."""

_I64, _I32 = np.int64(0), np.int32(0)


def site_table(sites: Sequence[LoraSite]) -> NDArray[np.int64]:
    """The array `sites` of a layer's sites, whose first column in S is 0 yet."""
    table = np.zeros((len(sites), SLICES + 2 * max(len(site.slices) for site in sites)), np.int64)
    for row, site in zip(table, sites, strict=True):
        row[[MODULE, DEPTH, COUNT]] = site.row - sites[0].row, site.in_features, len(site.slices)
        row[SLICES : SLICES + 2 * len(site.slices)] = [n for start, stop in site.slices for n in (start, stop - start)]
    return table


@compiled()
def _rank(factors, layer, module, slot):
    return np.int64(peek(factors.ranks, (layer * factors.modules + module) * factors.slots + slot, _I32))


@compiled()
def _scale(factors, layer, module, slot):
    return peek(factors.scaling, (layer * factors.modules + module) * factors.slots + slot, float32(0))


@compiled()
def _element(factors, table, layer, module, slot):
    """Bytes from the start of the arena to a matrix; table is a_offset or b_offset."""
    return 4 * peek(table, (layer * factors.modules + module) * factors.slots + slot, _I64)


@compiled()
def _width(factors, site, layer, slot):
    """Columns of S that a slot takes at a site."""
    total = 0
    for j in range(site[COUNT]):
        total += padded(_rank(factors, layer, site[MODULE] + j, slot))
    return total


@compiled()
def _transpose(source, rows, columns, out, out_step, whole):
    """out[c, r] = source[r, c], with zeros for the r from `rows` up to `whole`."""
    for c in range(columns):
        place = out + c * out_step
        for r in range(rows):
            store(place, r, load(source, r * columns + c, float32(0)), float32(0))
        for r in range(rows, whole):
            store(place, r, float32(0), float32(0))


@compiled()
def pack_inputs(task, factors, sites, packs, slots, layer):
    """Task sites · i + s: A of slot number i at site s, all modules side by side, with its rows as columns."""
    number, site = task // sites.shape[0], sites[task % sites.shape[0]]
    slot = slots[number]
    step, column = 4 * _width(factors, site, layer, slot), 0
    for j in range(site[COUNT]):
        rank = _rank(factors, layer, site[MODULE] + j, slot)
        if rank == 0:
            continue
        a = factors.arena + _element(factors, factors.a_offset, layer, site[MODULE] + j, slot)
        _transpose(a, rank, site[DEPTH], packs[number, task % sites.shape[0]] + 4 * column, step, padded(rank))
        column += padded(rank)


@compiled()
def pack_outputs(task, factors, sites, packs, slots, layer):
    """Task sites · i + s: B of slot number i at site s, module by module, each [width, padded rank]."""
    number, site = task // sites.shape[0], sites[task % sites.shape[0]]
    slot = slots[number]
    for j in range(site[COUNT]):
        module = site[MODULE] + j
        rank = _rank(factors, layer, module, slot)
        if rank > 0:
            bt = factors.arena + _element(factors, factors.b_offset, layer, module, slot)
            width = site[SLICES + 2 * j + 1]
            _transpose(bt, rank, width, packs[number, sites.shape[0] + module], 4 * padded(rank), padded(rank))


@compiled()
def shrink(piece, factors, sites, number, packs, layer, x, x_step, s):
    """S = x · Aᵀ at site `number` for the rows of a piece."""
    slot, first, rows, ordinal = piece
    site = sites[number]
    width = _width(factors, site, layer, slot) if slot >= 0 else 0
    if width:
        out = s + first * factors.s_step + 4 * site[S_COLUMN]
        times(
            factors.times, rows, width, x + first * x_step, x_step, 4, packs[ordinal, number], 4 * width, site[DEPTH],
            out, factors.s_step, SET, 1.0,
        )  # fmt: skip


@compiled()
def shrink_back(piece, factors, sites, number, packs, layer, dy, dy_step, ds):
    """dS = c · dY · B at site `number` for the rows of a piece."""
    slot, first, rows, ordinal = piece
    if slot < 0:
        return
    site, column = sites[number], sites[number][S_COLUMN]
    for j in range(site[COUNT]):
        module = site[MODULE] + j
        rank = _rank(factors, layer, module, slot)
        if rank > 0:
            start, width, whole = site[SLICES + 2 * j], site[SLICES + 2 * j + 1], padded(rank)
            times(
                factors.times, rows, whole, dy + first * dy_step + 4 * start, dy_step, 4,
                packs[ordinal, sites.shape[0] + module], 4 * whole, width, ds + first * factors.s_step + 4 * column,
                factors.s_step, SET, _scale(factors, layer, module, slot),
            )  # fmt: skip
            column += whole


@compiled()
def expand(pieces, start, stop, low, high, factors, sites, number, layer, s, out, out_step):
    """y += c · S · Bᵀ for the rows start … stop - 1 and the columns low … high - 1 of a site's y at `out`."""
    site = sites[number]
    for index in range(pieces.shape[0]):
        slot = pieces[index, 0]
        first, last = max(start, pieces[index, 1]), min(stop, pieces[index, 1] + pieces[index, 2])
        if slot < 0 or first >= last:
            continue
        column = site[S_COLUMN]
        for j in range(site[COUNT]):
            module = site[MODULE] + j
            rank = _rank(factors, layer, module, slot)
            if rank == 0:
                continue
            begin, width = site[SLICES + 2 * j], site[SLICES + 2 * j + 1]
            left, right = max(low, begin), min(high, begin + width)
            if left < right:
                bt = factors.arena + _element(factors, factors.b_offset, layer, module, slot)
                times(
                    factors.times, last - first, right - left, s + first * factors.s_step + 4 * column,
                    factors.s_step, 4, bt + 4 * (left - begin), 4 * width, rank, out + first * out_step + 4 * left,
                    out_step, ADD, _scale(factors, layer, module, slot),
                )  # fmt: skip
            column += padded(rank)


@compiled()
def expand_back(pieces, start, stop, low, high, factors, sites, number, layer, ds, out, out_step):
    """dX += dS · A for the rows start … stop - 1 and the columns low … high - 1 of a site's x at `out`."""
    site = sites[number]
    for index in range(pieces.shape[0]):
        slot = pieces[index, 0]
        first, last = max(start, pieces[index, 1]), min(stop, pieces[index, 1] + pieces[index, 2])
        if slot < 0 or first >= last:
            continue
        column = site[S_COLUMN]
        for j in range(site[COUNT]):
            rank = _rank(factors, layer, site[MODULE] + j, slot)
            if rank == 0:
                continue
            a = factors.arena + _element(factors, factors.a_offset, layer, site[MODULE] + j, slot)
            times(
                factors.times, last - first, high - low, ds + first * factors.s_step + 4 * column, factors.s_step, 4,
                a + 4 * low, 4 * site[DEPTH], rank, out + first * out_step + 4 * low, out_step, ADD, 1.0,
            )  # fmt: skip
            column += padded(rank)


@compiled()
def _chunks(columns):
    return (columns + SUM_COLUMNS - 1) // SUM_COLUMNS


@compiled()
def gradient_tasks(sites, number):
    """How many tasks `gradient_task` has for each slot at site `number`."""
    site, total = sites[number], 0
    for j in range(site[COUNT]):
        total += _chunks(site[DEPTH]) + _chunks(site[SLICES + 2 * j + 1])
    return total


@compiled()
def _sum_rows(link, runs, begin, end, rank, columns, coefficients, step, values, value_step, out, out_step, scale):
    """out[r, c] += scale · Σ coefficients[t, r] · values[t, c] over the rows t of some runs."""
    for index in range(begin, end):
        first, last = runs[index, 1], runs[index, 1] + runs[index, 2]
        for row in range(first, last, SUM_ROWS):
            times(
                link, rank, columns, coefficients + row * step, 4, step, values + row * value_step, value_step,
                min(SUM_ROWS, last - row), out, out_step, ADD, scale,
            )  # fmt: skip


@compiled()
def gradient_task(task, factors, sites, number, runs, bounds, slots, layer, x, x_step, dy, dy_step, s, ds):
    """Add a part of dA or dBᵀ at site `number`, for slot task // gradient_tasks(…) of the stream.

    runs: int64 [n, 3]: slot, first row, rows. bounds: int64 [slots + 1], where each slot's runs begin.
    """
    site, per_slot = sites[number], gradient_tasks(sites, number)
    ordinal, left = task // per_slot, task % per_slot
    slot, column = slots[ordinal], site[S_COLUMN]
    begin, end = bounds[ordinal], bounds[ordinal + 1]
    for j in range(site[COUNT]):
        module = site[MODULE] + j
        rank = _rank(factors, layer, module, slot)
        start, width = site[SLICES + 2 * j], site[SLICES + 2 * j + 1]
        for side in range(2):
            columns = site[DEPTH] if side == 0 else width
            if left >= _chunks(columns):
                left -= _chunks(columns)
                continue
            if rank > 0:
                low = left * SUM_COLUMNS
                size = min(SUM_COLUMNS, columns - low)
                if side == 0:
                    out = factors.grad + _element(factors, factors.a_offset, layer, module, slot) + 4 * low
                    _sum_rows(
                        factors.times, runs, begin, end, rank, size, ds + 4 * column, factors.s_step, x + 4 * low,
                        x_step, out, 4 * columns, 1.0,
                    )  # fmt: skip
                else:
                    out = factors.grad + _element(factors, factors.b_offset, layer, module, slot) + 4 * low
                    _sum_rows(
                        factors.times, runs, begin, end, rank, size, s + 4 * column, factors.s_step,
                        dy + 4 * (start + low), dy_step, out, 4 * columns, _scale(factors, layer, module, slot),
                    )  # fmt: skip
            return
        column += padded(rank)
