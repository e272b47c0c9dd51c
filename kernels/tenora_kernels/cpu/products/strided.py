"""One inner loop for every product whose operands lie as they lie: float32, any strides, both sides of a gradient.

`out[i, c] = scale · Σ_k x[i, k] · w[k, c]` where x may be read along either of its sides and the rows of w are whole
vectors. The low-rank terms, their gradients and attention are all of this form, so that none of them needs a sum across
vector lanes. Each number is one chain of fused multiply-adds in the order of k.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.products.product import MAX_ROWS
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.function_pointers import address_of, caller
from tenora_kernels.cpu.runtime.vectors import LANES, Vectors, accumulators, integer, multiply_add, switch

__all__ = ["ADD", "SET", "WIDTH", "padded", "times", "times_address"]

WIDTH = 2 * LANES
"""Columns of a full tile."""

SET, ADD = 0, 1
"""Overwrite `out`, or add to it."""

_MOST_VECTORS = 2


@intrinsic
def _tile(typing, rows, vectors, x, x_step, x_next, w, w_step, depth, out, out_step, add, scale):
    """A tile of 1 to 6 rows and 1 or 2 vectors of columns; addresses and steps in bytes."""
    del typing
    signature = types.void(*[types.int64] * 11, types.float32)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        count, width, x_at, x_row, x_move, w_at, w_row, steps, out_at, out_row, add_value, factor_value = args
        code = Vectors(builder)
        adds = builder.icmp_signed("!=", add_value, integer(0))

        def emit(case: int) -> None:
            rows, columns = divmod(case, 4)
            sums = accumulators(code, rows, columns)
            starts = [builder.add(x_at, builder.mul(x_row, integer(i))) for i in range(rows)]
            with cgutils.for_range(builder, steps) as loop:
                line = builder.add(w_at, builder.mul(loop.index, w_row))
                weights = [code.load(builder.add(line, integer(4 * LANES * c))) for c in range(columns)]
                moved = builder.mul(loop.index, x_move)
                for start, row in zip(starts, sums, strict=True):
                    multiply_add(code, builder.add(start, moved), weights, row)
            factor = code.broadcast(factor_value)
            for i, row in enumerate(sums):
                start = builder.add(out_at, builder.mul(out_row, integer(i)))
                for c, total in enumerate(row):
                    place = builder.add(start, integer(4 * LANES * c))
                    value = builder.fmul(builder.load(total), factor)
                    with builder.if_else(adds) as (then, otherwise):
                        with then:
                            code.store(builder.fadd(code.load(place), value), place)
                        with otherwise:
                            code.store(value, place)

        number = builder.add(builder.mul(count, integer(4)), width)
        cases = [4 * rows + columns for rows in range(1, MAX_ROWS + 1) for columns in range(1, _MOST_VECTORS + 1)]
        switch(builder, number, cases, emit)
        return context.get_dummy_value()

    return signature, codegen


_SIGNATURE = types.void(*[types.int64] * 11, types.float32)
_call = caller(_SIGNATURE)


def _times(rows, columns, x, x_step, x_next, w, w_step, depth, out, out_step, add, scale):
    blocks = (rows + MAX_ROWS - 1) // MAX_ROWS
    column = 0
    while column < columns:
        vectors = 2 if column + WIDTH <= columns else 1
        for block in range(blocks):
            start, stop = rows * block // blocks, rows * (block + 1) // blocks
            _tile(
                stop - start, vectors, x + start * x_step, x_step, x_next, w + 4 * column, w_step, depth,
                out + start * out_step + 4 * column, out_step, add, scale,
            )  # fmt: skip
        column += vectors * LANES


@functools.cache
def times_address() -> int:
    """What `times` wants first; compiles it, or reads it from the cache on disk."""
    return address_of(_times, _SIGNATURE)


@compiled()
def times(link, rows, columns, x, x_step, x_next, w, w_step, depth, out, out_step, add, scale):
    """out[i, c] (+)= scale · Σ_k x[i, k] · w[k, c] for `columns` columns, a multiple of LANES.

    Args:
        link: `times_address()`.
        rows: of x and out.
        columns: of w and out.
        x, x_step, x_next: address of float32 x[0, 0]; bytes from row to row and from k to k + 1.
        w, w_step: address of float32 w[0, 0]; bytes from k to k + 1.
        depth: how many k there are.
        out, out_step: address of float32 out[0, 0]; bytes from row to row.
        add: SET or ADD.
        scale: float32.
    """
    _call(link, (rows, columns, x, x_step, x_next, w, w_step, depth, out, out_step, add, float32(scale)))


@compiled()
def padded(rank):
    """A rank rounded up to whole vectors."""
    return (rank + LANES - 1) // LANES * LANES
