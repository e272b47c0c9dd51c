"""The two inner loops of the low-rank op, written as LLVM vectors so that nothing depends on an auto-vectoriser.

`shrink` multiplies a few rows of x with a few rows of A, `expand` adds a few rows of coefficients times Bᵀ to a few
rows of y. Every number is one chain of fused multiply-adds whose order depends on its own operands alone: the vector
lanes of k = 0, 1, … for shrink, the ranks 0, 1, … for expand. How many rows share a tile never changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types, uint16
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.runtime.values import to_float
from tenora_kernels.cpu.runtime.vectors import LANES, Vectors, accumulators, float_at, integer, prefetch, switch

__all__ = ["CACHE_LINE", "MAX_ROWS", "STACK_FLOATS", "expand", "fetch_add", "shrink", "stack"]

MAX_ROWS = 3
"""Rows of a tile: 3 times 4 accumulators, 3 operands of one side and 1 of the other fill the 16 registers of AVX2."""

STACK_FLOATS = 8192
"""float32 values that a block of rows may shrink to: 24 rows of rank 256 do, or one of rank 8192."""

_SHRINK_TILES = [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (3, 4), (3, 2), (3, 1)]
_EXPAND_TILES = [(1, 8), (1, 4), (1, 1), (1, 0), (2, 4), (2, 1), (2, 0), (3, 4), (3, 1), (3, 0)]

_FLOAT, _HALF, _WORD, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)

CACHE_LINE = 64


def _switch(builder: Any, rows: Any, columns: Any, tiles: Iterable[tuple[int, int]], emit: Callable[..., None]) -> None:
    """Run the code for the tile that `rows` and `columns` are at run time."""
    number = builder.add(builder.mul(rows, integer(16)), columns)
    switch(builder, number, [16 * tile[0] + tile[1] for tile in tiles], lambda case: emit(*divmod(case, 16)))


class _Memory:
    """Addresses, and scalars and vectors of one element type, float32 or bfloat16."""

    def __init__(self, builder: Any, is_bf16: bool, lanes: int = LANES) -> None:
        self.vectors = Vectors(builder, lanes)
        self.builder = builder
        self.is_bf16 = is_bf16
        self.size = 2 if is_bf16 else 4

    def at(self, start: Any, index: Any) -> Any:
        """The address of element `index`."""
        return self.builder.add(start, self.builder.mul(index, integer(self.size)))

    def load(self, address: Any) -> Any:
        return self.vectors.load(address, self.is_bf16)

    def first_lane(self, address: Any) -> Any:
        """A vector with one element in its first lane and zeros behind it."""
        kind = _HALF if self.is_bf16 else _FLOAT
        place = self.builder.inttoptr(address, kind.as_pointer())
        value = to_float(self.builder, self.builder.load(place))
        return self.builder.insert_element(ir.Constant(self.vectors.kind, None), value, ir.Constant(_WORD, 0))

    def store(self, value: Any, address: Any) -> None:
        self.vectors.store(value, address, self.is_bf16)


def _rows(builder: Any, start: Any, stride: Any, index: Any, count: int) -> list[Any]:
    """Addresses of the rows that the int64 values at `index` name; `stride` is in bytes."""
    numbers = builder.inttoptr(index, _I64.as_pointer())
    return [
        builder.add(start, builder.mul(builder.load(builder.gep(numbers, [integer(i)])), stride)) for i in range(count)
    ]


def _fetch_lines(builder: Any, ahead: Any, lines: Any, step: Any) -> None:
    """Fetch the next `lines` cache lines of what lies at `ahead` into the cache; `step` counts the calls."""
    start = builder.add(ahead, builder.mul(builder.mul(step, lines), integer(CACHE_LINE)))
    with cgutils.for_range(builder, lines) as loop:
        prefetch(builder, builder.add(start, builder.mul(loop.index, integer(CACHE_LINE))), near=True)


def _sums(vectors: Vectors, values: list[Any]) -> Any:
    """<4 x float>: the sum over the lanes of each of four vectors, all four in the same order of additions."""
    builder, lanes = vectors.builder, vectors.lanes

    def shuffled(a: Any, b: Any, mask: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(mask)), mask))

    def pairs(a: Any, b: Any) -> Any:
        # Within each 128 bits, where a shuffle costs one cycle.
        groups = range(0, lanes, 4)
        even = [lane for g in groups for lane in (g, g + 2, lanes + g, lanes + g + 2)]
        return builder.fadd(shuffled(a, b, even), shuffled(a, b, [lane + 1 for lane in even]))

    total = pairs(pairs(values[0], values[1]), pairs(values[2], values[3]))
    while lanes > 4:
        lanes //= 2
        low, high = list(range(lanes)), list(range(lanes, 2 * lanes))
        total = builder.fadd(shuffled(total, total, low), shuffled(total, total, high))
    return total


@intrinsic
def shrink(typing, rows, ranks, x, x_stride, index, a, depth, scale, out, out_stride, ahead, lines, x_sample, a_sample):
    """`out[i, j] = scale · Σ_k x[index[i], k] · a[j, k]` for a known tile of (rows, ranks) numbers.

    `x`, `index` (int64), `a` and `out` (float32) are addresses, strides are in bytes, `a` is contiguous, [·, depth].
    A single row has nothing to wait for but memory: with each vector of k, `lines` cache lines from `ahead` on are
    fetched.
    """
    del typing
    word = types.intp
    signature = types.void(
        word, word, word, word, word, word, word, types.float32, word, word, word, word, x_sample, a_sample
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (rows, ranks, x, x_stride, index, a, depth, scale, out, out_stride, ahead, lines, _, _) = args
        left, right = (_Memory(builder, kind == uint16) for kind in sig.args[-2:])
        vectors = left.vectors

        def tile(rows: int, ranks: int) -> None:
            zero = ir.Constant(vectors.kind, None)
            sums = accumulators(vectors, rows, ranks)
            x_rows = _rows(builder, x, x_stride, index, rows)
            a_rows = [right.at(a, builder.mul(depth, integer(j))) for j in range(ranks)]

            def step(k: Any, x_load: Any, a_load: Any) -> None:
                values = [x_load(left.at(start, k)) for start in x_rows]
                for j, start in enumerate(a_rows):
                    weight = a_load(right.at(start, k))
                    for i, value in enumerate(values):
                        builder.store(vectors.fma(value, weight, builder.load(sums[i][j])), sums[i][j])

            whole = builder.udiv(depth, integer(LANES))
            with cgutils.for_range(builder, whole) as loop:
                if rows == 1:
                    _fetch_lines(builder, ahead, lines, loop.index)
                step(builder.mul(loop.index, integer(LANES)), left.load, right.load)
            start = builder.mul(whole, integer(LANES))
            with cgutils.for_range(builder, builder.sub(depth, start)) as loop:
                step(builder.add(start, loop.index), left.first_lane, right.first_lane)
            for i in range(rows):
                place = builder.add(out, builder.mul(out_stride, integer(i)))
                for first in range(0, ranks, 4):
                    group = [builder.load(slot) for slot in sums[i][first : first + 4]]
                    total = _sums(vectors, group + [zero] * (4 - len(group)))
                    for j in range(len(group)):
                        value = builder.fmul(scale, builder.extract_element(total, ir.Constant(_WORD, j)))
                        pointer = float_at(builder, builder.add(place, integer(4 * (first + j))))
                        builder.store(value, pointer)

        _switch(builder, rows, ranks, _SHRINK_TILES, tile)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def expand(
    typing, rows, width, s, s_row, s_step, depth, b, b_stride, y, y_stride, index, ahead, lines, y_sample, b_sample
):
    """`y[index[i], c] += Σ_j s[i, j] · b[j, c]` for `rows` rows and `width` vectors of columns (0: a single column).

    All operands are addresses, all strides bytes: `s_row` from i to i + 1 and `s_step` from j to j + 1 of the float32
    coefficients, `b_stride` and `y_stride` from row to row. y is read and rounded once. A single row fetches `lines`
    cache lines from `ahead` on with each j.
    """
    del typing
    word = types.intp
    signature = types.void(*[word] * 13, y_sample, b_sample)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (rows, width, s, s_row, s_step, depth, b, b_stride, y, y_stride, index, ahead, lines, _, _) = args

        def tile(rows: int, width: int) -> None:
            lanes, columns = (LANES, width) if width else (1, 1)
            left, right = (_Memory(builder, kind == uint16, lanes) for kind in sig.args[-2:])
            vectors = left.vectors
            sums = accumulators(vectors, rows, columns)
            coefficients = [builder.add(s, builder.mul(s_row, integer(i))) for i in range(rows)]
            with cgutils.for_range(builder, depth) as loop:
                if rows == 1:
                    _fetch_lines(builder, ahead, lines, loop.index)
                step, start = builder.mul(loop.index, s_step), builder.add(b, builder.mul(loop.index, b_stride))
                values = []
                for coefficient in coefficients:
                    value = builder.load(float_at(builder, builder.add(coefficient, step)))
                    values.append(vectors.broadcast(value))
                for c in range(columns):
                    weight = right.load(right.at(start, integer(c * lanes)))
                    for i, value in enumerate(values):
                        builder.store(vectors.fma(value, weight, builder.load(sums[i][c])), sums[i][c])
            for i, row in enumerate(_rows(builder, y, y_stride, index, rows)):
                for c in range(columns):
                    place = left.at(row, integer(c * lanes))
                    left.store(builder.fadd(left.load(place), builder.load(sums[i][c])), place)

        _switch(builder, rows, width, _EXPAND_TILES, tile)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """int64: what lies at an address, which one thread at a time raises by one."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, integer(1), "monotonic")

    return types.int64(types.intp), codegen


def stack(words: int) -> Any:
    """An intrinsic without arguments: the address of `words` int64 values in the frame of the calling function."""

    @intrinsic
    def place(typing: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
            with builder.goto_entry_block():
                pointer = builder.alloca(ir.ArrayType(_I64, words))
                pointer.align = 64
            return builder.ptrtoint(pointer, _I64)

        return types.intp(), codegen

    return place
