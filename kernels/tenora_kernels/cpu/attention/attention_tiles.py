"""The inner loops of paged attention, written as LLVM vectors so that nothing depends on an auto-vectoriser.

Everything works on a *tile*: rows of queries (float32, one per query and head of a group) against a *panel* of 16 keys
or values. A number of a row is one chain of operations in the order of the positions, whatever rows and keys share its
tile: hence a row's result depends on nothing but its own sequence.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types, uint16
from numba.core import cgutils
from numba.extending import intrinsic

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

__all__ = [
    "LOWEST", "MAX_ROWS", "PANEL", "PANELS", "score", "score_pair", "score_quad", "softmax",
    "weigh", "weigh_half", "weigh_pair", "weigh_quad",
]  # fmt: skip

PANEL = 16
"""Keys that one step takes; positions 0 … 15 are a sequence's first panel."""

PANELS = 4
"""Panels between two corrections of the running sums."""

MAX_ROWS = 6
"""Rows that one step takes: 12 accumulators, 2 vectors of keys and 1 of queries fill the 16 registers of AVX2."""

LOWEST = -1.0e30
"""The largest of no scores: finite, so that the difference of two of them is a number."""

_FLOAT, _WORD, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _after(builder: Any, address: Any, size: int) -> Any:
    return builder.add(address, integer(size))


def _table_entry(builder: Any, table: Any, index: int) -> Any:
    """An address from a table of addresses."""
    return builder.load(builder.inttoptr(_after(builder, table, 8 * index), _I64.as_pointer()))


def _rows_with(vectors_per_row: int) -> int:
    """As many rows as have room for their accumulators in 12 registers."""
    return max(1, MAX_ROWS * 2 // vectors_per_row)


def _make_score(width: int) -> Any:
    """`score` for `width` panels at once: few rows need more columns to hide the latency of the additions."""

    @intrinsic
    def score(  # numba's own signature
        typing: Any, rows: Any, q: Any, q_stride: Any, panels: Any, key_stride: Any, depth: Any, s: Any, s_stride: Any,
        sample: Any,
    ) -> Any:  # fmt: skip
        """s[r, 16 p + j] = Σ_d q[r, d] · keys[p][d, j]; addresses and strides in bytes.

        panels: address of int64 addresses of panels of keys. PANELS places behind them stand the addresses of as many
        bytes that are fetched into the cache meanwhile. Keys hold the sample's type; q and s float32.
        """
        del typing, rows, q, q_stride, panels, key_stride, depth, s, s_stride
        is_bf16 = sample == uint16
        signature = types.void(*[types.intp] * 8, sample)

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            count, q_at, q_step, table, key_step, depth_value, s_at, s_step = args[:8]
            vectors = Vectors(builder)
            item = 2 if is_bf16 else 4
            per_panel = PANEL // LANES

            def emit(rows: int) -> None:
                sums = accumulators(vectors, rows, per_panel * width)
                starts = [builder.add(q_at, builder.mul(q_step, integer(row))) for row in range(rows)]
                panels = [_table_entry(builder, table, panel) for panel in range(width)]
                ahead = [_table_entry(builder, table, PANELS + panel) for panel in range(width)]
                with cgutils.for_range(builder, depth_value) as loop:
                    moved = builder.mul(loop.index, key_step)
                    weights = []
                    for panel, fetched in zip(panels, ahead, strict=True):
                        prefetch(builder, builder.add(fetched, builder.mul(loop.index, integer(PANEL * item))))
                        at = builder.add(panel, moved)
                        lanes = [_after(builder, at, c * LANES * item) for c in range(per_panel)]
                        weights += [vectors.load(lane, is_bf16) for lane in lanes]
                    offset = builder.mul(loop.index, integer(4))
                    for start, row in zip(starts, sums, strict=True):
                        multiply_add(vectors, builder.add(start, offset), weights, row)
                for index, row in enumerate(sums):
                    place = builder.add(s_at, builder.mul(s_step, integer(index)))
                    for column, accumulator in enumerate(row):
                        vectors.store(builder.load(accumulator), _after(builder, place, column * LANES * 4))

            switch(builder, count, range(1, _rows_with(2 * width) + 1), emit)
            return context.get_dummy_value()

        return signature, codegen

    return score


score = _make_score(1)
score_pair = _make_score(2)
"""The same for up to 3 rows and 2 panels."""
score_quad = _make_score(4)
"""The same for 1 row and 4 panels."""


def _make_weigh(width: int) -> Any:
    """`weigh` for `width` columns of values."""
    lanes = min(LANES, width)

    @intrinsic
    def weigh(
        typing: Any, rows: Any, p: Any, p_stride: Any, shrink: Any, panels: Any, keys: Any, column: Any,
        value_stride: Any, o: Any, o_stride: Any, sample: Any,
    ) -> Any:  # fmt: skip
        """o[r, c] = o[r, c] · shrink[r] + Σ_j p[r, j] · values[j, c], for the columns from `column` on.

        panels: address of int64 addresses, one for every 16 of the `keys` values, each at column 0 of its panel. Behind
        them stand addresses to fetch from, as with `score`. Strides are in bytes. Values hold the sample's type; o, p
        and shrink float32. Only `keys` values are read.
        """
        del typing, rows, p, p_stride, shrink, panels, keys, column, value_stride, o, o_stride
        is_bf16 = sample == uint16
        signature = types.void(*[types.intp] * 10, sample)

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = _Weighing(Vectors(builder, lanes), width // lanes, is_bf16, args)
            switch(builder, args[0], range(1, _rows_with(max(2, width // 8)) + 1), emit)
            return context.get_dummy_value()

        return signature, codegen

    return weigh


class _Weighing:
    """Writes `weigh` for one number of rows."""

    def __init__(self, vectors: Vectors, columns: int, is_bf16: bool, args: Any) -> None:
        self._vectors, self._columns, self._is_bf16 = vectors, columns, is_bf16
        self._item = 2 if is_bf16 else 4
        self._args = args

    def __call__(self, rows: int) -> None:
        vectors, builder = self._vectors, self._vectors.builder
        _, p_at, p_step, shrink_at, table, total, first, _, o_at, o_step = self._args[:10]
        lane_bytes = 4 * vectors.lanes
        sums = accumulators(vectors, rows, self._columns)
        o_first = builder.add(o_at, builder.mul(first, integer(4)))
        places = []
        for index in range(rows):
            row = builder.add(o_first, builder.mul(o_step, integer(index)))
            places.append([_after(builder, row, c * lane_bytes) for c in range(self._columns)])
            factor = vectors.broadcast(builder.load(float_at(builder, _after(builder, shrink_at, 4 * index))))
            for place, total_place in zip(places[index], sums[index], strict=True):
                builder.store(builder.fmul(vectors.load(place), factor), total_place)
        starts = [builder.add(p_at, builder.mul(p_step, integer(row))) for row in range(rows)]
        panels = builder.sdiv(builder.add(total, integer(PANEL - 1)), integer(PANEL))
        with cgutils.for_range(builder, panels) as panel:
            self._panel(builder.add(table, builder.mul(panel.index, integer(8))), panel.index, starts, sums)
        for row_places, row in zip(places, sums, strict=True):
            for place, total_place in zip(row_places, row, strict=True):
                vectors.store(builder.load(total_place), place)

    def _panel(self, entry: Any, number: Any, starts: list[Any], sums: list[list[Any]]) -> None:
        """The values of one panel."""
        vectors, builder = self._vectors, self._vectors.builder
        total, first, value_step = self._args[5:8]
        done = builder.mul(number, integer(PANEL))
        left = builder.sub(total, done)
        count = builder.select(builder.icmp_signed("<", left, integer(PANEL)), left, integer(PANEL))
        values = builder.add(_table_entry(builder, entry, 0), builder.mul(first, integer(self._item)))
        line = PANEL * self._item
        ahead = builder.add(_table_entry(builder, entry, PANELS), builder.mul(first, integer(line)))
        lane_bytes = vectors.lanes * self._item
        lines = max(1, self._columns * vectors.lanes // PANEL)
        with cgutils.for_range(builder, count) as key:
            fetched = builder.add(ahead, builder.mul(key.index, integer(line)))
            for number_of_line in range(lines):
                prefetch(builder, _after(builder, fetched, number_of_line * PANEL * line))
            at = builder.add(values, builder.mul(key.index, value_step))
            weights = [vectors.load(_after(builder, at, c * lane_bytes), self._is_bf16) for c in range(self._columns)]
            moved = builder.mul(builder.add(done, key.index), integer(4))
            for start, row in zip(starts, sums, strict=True):
                multiply_add(vectors, builder.add(start, moved), weights, row)


weigh = _make_weigh(16)
weigh_half = _make_weigh(8)
"""The same for 8 columns: the end of a head whose size is not a multiple of 16."""
weigh_pair = _make_weigh(32)
"""The same for up to 3 rows and 32 columns."""
weigh_quad = _make_weigh(64)
"""The same for 1 row and 64 columns."""


@intrinsic
def softmax(typing: Any, s: Any, panels: Any, first: Any, last: Any, state: Any, shrink: Any) -> Any:
    """Turn a row's scores into weights, relative to the largest score so far.

    s: address of float32 [16 · panels]; the scores of the keys first … last - 1 become e^(s - m), the others 0 whatever
    they hold. state: address of two float32, the largest score m so far (start with `LOWEST`) and the sum of weights;
    both are brought up to date. `shrink`: address of the float32 that earlier sums have to be multiplied with.
    """
    del typing, s, panels, first, last, state, shrink
    signature = types.void(*[types.intp] * 6)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s_at, panel_count, first_value, last_value, state_at, shrink_at = args
        vectors = Vectors(builder)
        steps = builder.mul(panel_count, integer(PANEL // LANES))
        low, high = (vectors.broadcast(builder.trunc(value, _WORD)) for value in (first_value, last_value))
        lane_numbers = ir.Constant(vectors.integers, list(range(LANES)))
        lowest = vectors.constant(LOWEST)

        def at_step(step: Any) -> tuple[Any, Any]:
            """The address of a vector of scores and which of its lanes count."""
            number = builder.trunc(builder.mul(step, integer(LANES)), _WORD)
            numbers = builder.add(vectors.broadcast(number), lane_numbers)
            counts = builder.and_(builder.icmp_signed(">=", numbers, low), builder.icmp_signed("<", numbers, high))
            return builder.add(s_at, builder.mul(step, integer(4 * LANES))), counts

        largest = cgutils.alloca_once_value(builder, lowest)
        with cgutils.for_range(builder, steps) as loop:
            place, counts = at_step(loop.index)
            scores = builder.select(counts, vectors.load(place), lowest)
            builder.store(vectors.larger(scores, builder.load(largest)), largest)
        m_place, sum_place = float_at(builder, state_at), float_at(builder, _after(builder, state_at, 4))
        before = vectors.broadcast(builder.load(m_place))
        top = vectors.broadcast(vectors.fold(builder.load(largest), vectors.larger))
        now = vectors.larger(top, before)
        factor = builder.extract_element(vectors.exp(builder.fsub(before, now)), ir.Constant(_WORD, 0))
        total = cgutils.alloca_once_value(builder, vectors.constant(0.0))
        with cgutils.for_range(builder, steps) as loop:
            place, counts = at_step(loop.index)
            weights = vectors.exp(builder.fsub(vectors.load(place), now))
            weights = builder.select(counts, weights, vectors.constant(0.0))
            vectors.store(weights, place)
            builder.store(builder.fadd(builder.load(total), weights), total)
        added = vectors.fold(builder.load(total), builder.fadd)
        builder.store(builder.extract_element(now, ir.Constant(_WORD, 0)), m_place)
        builder.store(builder.fadd(builder.fmul(builder.load(sum_place), factor), added), sum_place)
        builder.store(factor, float_at(builder, shrink_at))
        return context.get_dummy_value()

    return signature, codegen
