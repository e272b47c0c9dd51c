"""The inner loops of matrix products, written as LLVM vectors so that nothing depends on an auto-vectoriser.

Addresses and strides are int64 in bytes. Every number that they compute is one chain of fused multiply-adds in the
order of the contracted index, whatever rows and columns share the call: a row's result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types, uint32
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.runtime.values import to_float
from tenora_kernels.cpu.runtime.vectors import (
    LANES,
    Vectors,
    accumulators,
    float_at,
    integer,
    multiply_add,
    prefetch,
    switch,
)

__all__ = ["FEW_PANELS", "MAX_ROWS", "PANEL", "bytes_of", "multiply", "multiply_few", "packed_entry"]

PANEL = 2 * LANES
"""Columns of the output that one panel of packed weights makes."""

MAX_ROWS = 6
"""Rows that one call takes: 12 accumulators, 2 vectors of weights and 1 of x fill the 16 registers of AVX2."""

FEW_PANELS = (0, 4, 2, 2)
"""Panels at once for 1, 2 and 3 rows, with which one panel would leave the multipliers waiting for their results."""


@intrinsic
def bytes_of(typing: Any, sample: Any) -> Any:
    """Bytes of one packed weight: 2 for one of a pair of bfloat16 (uint32), 4 for a float32."""

    def codegen(_context: Any, _builder: Any, signature: Any, _args: Any) -> Any:
        return integer(4 if signature.args[0] == types.float32 else 2)

    return types.int64(sample), codegen


@intrinsic
def packed_entry(typing: Any, address: Any, line: Any, column: Any, sample: Any) -> Any:
    """The float32 in `column` of line `line` (panel · depth + k) of packed weights."""

    def codegen(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, line_value, column_value = args[:3]
        if signature.args[3] == types.float32:
            at = builder.add(builder.mul(line_value, integer(PANEL)), column_value)
            return builder.load(builder.gep(float_at(builder, start), [at]))
        # Column j is the low half of pair j, column LANES + j the high one: 16-bit element 2 j and 2 j + 1.
        pair = builder.urem(column_value, integer(LANES))
        at = builder.add(builder.mul(pair, integer(2)), builder.udiv(column_value, integer(LANES)))
        at = builder.add(at, builder.mul(line_value, integer(PANEL)))
        half = ir.IntType(16)
        value = builder.load(builder.gep(builder.inttoptr(start, half.as_pointer()), [at]))
        return to_float(builder, value)

    return types.float32(types.int64, types.int64, types.int64, sample), codegen


class _Loop:
    """Accumulators of `rows` rows by `columns` vectors, and the code that fills and empties them."""

    def __init__(self, builder: Any, rows: int, columns: int) -> None:
        self.builder = builder
        self.vectors = Vectors(builder)
        self.sums = accumulators(self.vectors, rows, columns)

    def places(self, start: Any, step: Any, count: int) -> list[Any]:
        """Addresses start, start + step, …"""
        found = [start]
        while len(found) < count:
            found.append(self.builder.add(found[-1], step))
        return found[:count]

    def packed(self, place: Any, is_bf16: bool) -> list[Any]:
        """The two vectors of a panel at one k.

        Those of bfloat16 come in pairs, each number the upper half of a float32: the low one moves up, the high one
        only loses its neighbour.
        """
        builder, vectors = self.builder, self.vectors
        if not is_bf16:
            return [vectors.load(place), vectors.load(builder.add(place, integer(4 * LANES)))]
        pairs = builder.load(builder.inttoptr(place, vectors.integers.as_pointer()), align=4)
        low = builder.shl(pairs, ir.Constant(vectors.integers, [16] * LANES))
        high = builder.and_(pairs, ir.Constant(vectors.integers, [0xFFFF0000] * LANES))
        return [builder.bitcast(half, vectors.kind) for half in (low, high)]

    def write(self, out: Any, out_step: Any, add: Any) -> None:
        """Store the sums at `out`; on top of what is there if `add`, an integer, is not 0."""
        builder, vectors = self.builder, self.vectors
        adds = builder.icmp_signed("!=", add, ir.Constant(add.type, 0))
        for start, totals in zip(self.places(out, out_step, len(self.sums)), self.sums, strict=True):
            for column, total in enumerate(totals):
                place = builder.add(start, integer(column * LANES * 4))
                with builder.if_else(adds) as (then, otherwise):
                    with then:
                        vectors.store(builder.fadd(vectors.load(place), builder.load(total)), place)
                    with otherwise:
                        vectors.store(builder.load(total), place)


def _make_multiply(cases: range, panels_of: Callable[[int], int]) -> Any:
    @intrinsic
    def multiply(typing, rows, x, x_step, w, depth, ahead, out, out_step, add, sample):
        del typing
        is_bf16 = sample == uint32
        signature = types.void(*[types.int64] * 9, sample)

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            count, x_at, x_step_value, w_at, depth_value, ahead_at, out_at, out_step_value, add_value = args[:9]
            line = integer(PANEL * (2 if is_bf16 else 4))

            def emit(rows: int) -> None:
                loop_code = _Loop(builder, rows, 2 * panels_of(rows))
                starts = loop_code.places(x_at, x_step_value, rows)
                panels = loop_code.places(w_at, builder.mul(depth_value, line), panels_of(rows))
                with cgutils.for_range(builder, depth_value) as loop:
                    offset = builder.mul(loop.index, line)
                    prefetch(builder, builder.add(ahead_at, offset))
                    weights = [v for panel in panels for v in loop_code.packed(builder.add(panel, offset), is_bf16)]
                    here = builder.mul(loop.index, integer(4))
                    for start, sums in zip(starts, loop_code.sums, strict=True):
                        multiply_add(loop_code.vectors, builder.add(start, here), weights, sums)
                loop_code.write(out_at, out_step_value, add_value)

            switch(builder, count, cases, emit)
            return context.get_dummy_value()

        return signature, codegen

    return multiply


multiply = _make_multiply(range(1, MAX_ROWS + 1), lambda _: 1)
"""out[i, 0:PANEL] (+)= Σ_k x[i, k] · w[k, 0:PANEL] for 1 to 6 rows.

Args: rows, x, x_step, w (a packed panel, see `gemm`), depth, ahead (from where a panel's bytes are fetched meanwhile),
out, out_step, add (0 overwrites), sample (uint32: pairs of bfloat16; float32).
"""

multiply_few = _make_multiply(range(1, 4), FEW_PANELS.__getitem__)
"""`multiply` for 1 to 3 rows and FEW_PANELS[rows] panels that lie one after the other."""
