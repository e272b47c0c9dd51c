"""Causal attention inside a stream of whole sequences, forward and backward, in float32: what training needs.

A sequence sees its own tokens and, before them, the first tokens of one other sequence of the stream if it names one:
rows that begin alike (a system prompt, say) then compute their common beginning once. A task of the forward pass is one
head of up to QUERIES queries; one of the backward pass is one head of a *family*, the sequences that share a beginning,
in the order of the stream. Scores of a task's queries against all their keys exist at once, nothing else of that size.
Softmax and its gradient as in Dao, "FlashAttention-2" (2023): only the logarithm of each row's sum is kept.

Each number is computed in an order that its own sequence determines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.attention.attention_tiles import LOWEST
from tenora_kernels.cpu.products.rowwise import scale_row
from tenora_kernels.cpu.products.strided import ADD, SET, WIDTH, times
from tenora_kernels.cpu.runtime.arguments import declare
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.values import FAST, load, store
from tenora_kernels.cpu.runtime.vectors import LANES, Vectors, integer

__all__ = [
    "ATTENTION", "BACKWARD_ONLY", "FORWARD_ONLY", "QUERIES", "SEQUENCE", "attend_family", "attend_item", "exponentials",
    "largest", "score_columns",
]  # fmt: skip

QUERIES = 48
"""Queries of a block: with scores of 500 keys they fit the second-level cache."""

ATTENTION = declare(
    "tokens", "heads", "kv_heads", "dim", "panels", "qkv", "q", "transposed_keys", "transposed_values", "keys",
    "values", "out", "log_sum", "d_out", "dq", "dk", "dv", "d_qkv", "cos", "sin", "norm", "scores", "scores_row",
    "times",
)  # fmt: skip
"""Addresses in bytes. q, dq, dk, dv: float32 [heads, T, D]; transposed_keys and transposed_values: [kv heads, panels,
D, WIDTH]; keys and values: [kv heads, D / WIDTH, T, WIDTH]; log_sum: [heads, T]; out and d_out: [T, heads · D]; scores:
two blocks of [QUERIES, scores_row] for each member; times: `times_address()`. A norm that does not exist is 0.
"""

FORWARD_ONLY = ("values",)
BACKWARD_ONLY = ("transposed_values", "keys", "d_out", "dq", "dk", "dv", "d_qkv")
"""What one direction does not read."""

SEQUENCE = declare("start", "count", "panel", "shared", "shared_count")
"""A sequence's tokens, its first panel of keys, whose tokens it sees first (-1: nobody else's) and how many of them."""


def score_columns(count: int, shared: int) -> int:
    """Columns of a block of scores: whole panels for either kind of keys, an odd number of them.

    Rows that are a power of two apart would meet in the same sets of the cache.
    """
    panels = -(-count // WIDTH) + -(-shared // WIDTH)
    return (panels + 1 - panels % 2) * WIDTH


@intrinsic
def largest(typing: Any, s: Any, count: Any) -> Any:
    """The largest of `count` float32 numbers at an address, or LOWEST."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        code = Vectors(builder)
        lowest = code.constant(LOWEST)
        top = cgutils.alloca_once_value(builder, lowest)
        with cgutils.for_range(builder, _vectors_of(builder, args[1])) as loop:
            value, counts = _lanes(code, args[0], loop.index, args[1])
            builder.store(code.larger(builder.select(counts, value, lowest), builder.load(top)), top)
        return code.fold(builder.load(top), code.larger)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def exponentials(typing: Any, s: Any, count: Any, vectors: Any, top: Any) -> Any:
    """s = e^(s - top) for the first `count` of so many vectors, 0 for the others; gives their sum."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        code = Vectors(builder)
        zero, base = code.constant(0.0), code.broadcast(args[3])
        total = cgutils.alloca_once_value(builder, zero)
        with cgutils.for_range(builder, args[2]) as loop:
            value, counts = _lanes(code, args[0], loop.index, args[1])
            value = builder.select(counts, code.exp(builder.fsub(value, base)), zero)
            code.store(value, builder.add(args[0], builder.mul(loop.index, integer(4 * LANES))))
            builder.store(builder.fadd(builder.load(total), value), total)
        return code.fold(builder.load(total), builder.fadd)

    return types.float32(types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def _slopes(typing: Any, weights: Any, slopes: Any, count: Any, vectors: Any, mean: Any) -> Any:
    """slopes = weights · (slopes - mean) for the first `count` of so many vectors, 0 for the others."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        code = Vectors(builder)
        zero, middle = code.constant(0.0), code.broadcast(args[4])
        with cgutils.for_range(builder, args[3]) as loop:
            value, counts = _lanes(code, args[1], loop.index, args[2])
            offset = builder.mul(loop.index, integer(4 * LANES))
            value = builder.fmul(code.load(builder.add(args[0], offset)), builder.fsub(value, middle))
            code.store(builder.select(counts, value, zero), builder.add(args[1], offset))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen


def _vectors_of(builder: Any, count: Any) -> Any:
    return builder.udiv(builder.add(count, integer(LANES - 1)), integer(LANES))


def _lanes(code: Vectors, start: Any, step: Any, count: Any) -> tuple[Any, Any]:
    """A vector of the row at `start`, and which of its lanes are among the first `count`."""
    builder, word = code.builder, ir.IntType(32)
    numbers = builder.add(
        code.broadcast(builder.trunc(builder.mul(step, integer(LANES)), word)),
        ir.Constant(code.integers, list(range(LANES))),
    )
    counts = builder.icmp_signed("<", numbers, code.broadcast(builder.trunc(count, word)))
    return code.load(builder.add(start, builder.mul(step, integer(4 * LANES)))), counts


@compiled(fastmath=FAST)
def _dot(a, b, columns):
    total = float32(0.0)
    for i in range(columns):
        total += load(a, i, float32(0)) * load(b, i, float32(0))
    return total


@compiled()
def _panels(keys):
    return (keys + WIDTH - 1) // WIDTH


@compiled()
def _products(link, rows, first, count, shared, x, x_step, transposed, own_panel, shared_panel, dim, out, out_step):
    """out[r, key] = x[r] · key for the rows' keys: `shared` ones, then their own up to each row.

    transposed: address of a head's panels [panels, dim, WIDTH]. first: the first row's place in its sequence. `count`
    keys are the sequence's own.
    """
    size = dim * WIDTH * 4
    for panel in range(_panels(shared)):
        times(
            link, rows, WIDTH, x, x_step, 4, transposed + (shared_panel + panel) * size, WIDTH * 4, dim,
            out + panel * WIDTH * 4, out_step, SET, 1.0,
        )  # fmt: skip
    own = out + _panels(shared) * WIDTH * 4
    for panel in range(_panels(min(count, first + rows))):
        skipped = max(0, panel * WIDTH - first)
        times(
            link, rows - skipped, WIDTH, x + skipped * x_step, x_step, 4, transposed + (own_panel + panel) * size,
            WIDTH * 4, dim, own + panel * WIDTH * 4 + skipped * out_step, out_step, SET, 1.0,
        )  # fmt: skip


@compiled()
def _mix(link, rows, first, shared, s, s_step, values, own, others, tokens, dim, out, out_step, scale):
    """out[r] = scale · Σ_key s[r, key] · value[key]; `values`: a head's [dim / WIDTH, tokens, WIDTH]."""
    line = WIDTH * 4
    for column in range(dim // WIDTH):
        panel, target = values + column * tokens * line, out + column * line
        if shared > 0:
            times(link, rows, WIDTH, s, s_step, 4, panel + others * line, line, shared, target, out_step, SET, scale)
        mine, row = s + _panels(shared) * line, 0
        while row < rows:
            size = min(6, rows - row)  # later keys weigh nothing
            times(
                link, size, WIDTH, mine + row * s_step, s_step, 4, panel + own * line, line, first + row + size,
                target + row * out_step, out_step, ADD if shared > 0 else SET, scale,
            )  # fmt: skip
            row += size


@compiled()
def _gather(link, rows, first, shared, s, s_step, x, x_step, dim, own_out, shared_out):
    """out[key] += Σ_r s[r, key] · x[r], rows of D float32 for either kind of keys."""
    if shared > 0:
        times(link, shared, dim, s, 4, s_step, x, x_step, rows, shared_out, dim * 4, ADD, 1.0)
    mine, key = s + _panels(shared) * WIDTH * 4, 0
    while key < first + rows:
        size, skipped = min(6, first + rows - key), max(0, key - first)
        times(
            link, size, dim, mine + key * 4 + skipped * s_step, 4, s_step, x + skipped * x_step, x_step, rows - skipped,
            own_out + key * dim * 4, dim * 4, ADD, 1.0,
        )  # fmt: skip
        key += size


@compiled()
def _score(attention, sequences, number, head, first, rows, s):
    """Scores of a block of queries: what `_products` wants to know, from the arrays."""
    tokens, dim = attention.tokens, attention.dim
    kv_head = head // (attention.heads // attention.kv_heads)
    sequence = sequences[number]
    q = attention.q + (head * tokens + sequence.start + first) * dim * 4
    other = sequences[max(0, sequence.shared)]
    transposed = attention.transposed_keys + kv_head * attention.panels * dim * WIDTH * 4
    _products(
        attention.times, rows, first, sequence.count, sequence.shared_count, q, dim * 4, transposed, sequence.panel,
        other.panel, dim, s, attention.scores_row * 4,
    )  # fmt: skip


@compiled()
def attend_item(attention, sequences, number, head, first, rows, member):
    """OUT and LOG_SUM of one head for `rows` queries of sequence `number` from its token `first` on."""
    tokens, dim, step, link = attention.tokens, attention.dim, attention.scores_row * 4, attention.times
    sequence = sequences[number]
    shared, kv_head = sequence.shared_count, head // (attention.heads // attention.kv_heads)
    s = attention.scores + member * 2 * QUERIES * step
    out_step = attention.heads * dim * 4
    out = attention.out + (sequence.start + first) * out_step + head * dim * 4
    sums = attention.log_sum + (head * tokens + sequence.start + first) * 4
    _score(attention, sequences, number, head, first, rows, s)
    mine, vectors = _panels(shared) * WIDTH * 4, _panels(first + rows) * 2
    for row in range(rows):
        at = s + row * step
        top = max(largest(at, shared), largest(at + mine, first + row + 1))
        total = exponentials(at, shared, _panels(shared) * 2, top)
        total += exponentials(at + mine, first + row + 1, vectors, top)
        # Until the product is made, the row's sum stands where its logarithm will be.
        store(sums, row, total, float32(0))
        store(attention.scores + (member * 2 + 1) * QUERIES * step, row, top, float32(0))
    other = sequences[max(0, sequence.shared)]
    values = attention.values + kv_head * tokens * dim * 4
    _mix(link, rows, first, shared, s, step, values, sequence.start, other.start, tokens, dim, out, out_step, 1.0)
    for row in range(rows):
        total = load(sums, row, float32(0))
        scale_row(out + row * out_step, float32(1) / total, dim, out + row * out_step)
        top = load(attention.scores + (member * 2 + 1) * QUERIES * step, row, float32(0))
        store(sums, row, top + float32(np.log(total)), float32(0))


@compiled()
def _zero(attention, sequence, head):
    """DK and DV of a sequence's tokens."""
    dim = attention.dim
    at = (head * attention.tokens + sequence.start) * dim
    for i in range(at, at + sequence.count * dim):
        store(attention.dk, i, float32(0), float32(0))
        store(attention.dv, i, float32(0), float32(0))


@compiled()
def _attend_back(attention, sequences, number, head, first, rows, scale, member):
    """DQ of a block of queries, and what it adds to DK and DV."""
    tokens, dim, step, link = attention.tokens, attention.dim, attention.scores_row * 4, attention.times
    sequence = sequences[number]
    shared, kv_head = sequence.shared_count, head // (attention.heads // attention.kv_heads)
    other = sequences[max(0, sequence.shared)]
    s = attention.scores + member * 2 * QUERIES * step
    ds = s + QUERIES * step
    row_step, token = attention.heads * dim * 4, sequence.start + first
    d_out = attention.d_out + token * row_step + head * dim * 4
    sums = attention.log_sum + (head * tokens + token) * 4
    mine, vectors = _panels(shared) * WIDTH * 4, _panels(first + rows) * 2
    _score(attention, sequences, number, head, first, rows, s)
    for row in range(rows):
        at, top = s + row * step, load(sums, row, float32(0))
        exponentials(at, shared, _panels(shared) * 2, top)
        exponentials(at + mine, first + row + 1, vectors, top)
    own = (head * tokens + sequence.start) * dim * 4
    others = (head * tokens + other.start) * dim * 4
    _gather(link, rows, first, shared, s, step, d_out, row_step, dim, attention.dv + own, attention.dv + others)
    transposed = attention.transposed_values + kv_head * attention.panels * dim * WIDTH * 4
    _products(
        link, rows, first, sequence.count, shared, d_out, row_step, transposed, sequence.panel, other.panel, dim, ds,
        step,
    )  # fmt: skip
    for row in range(rows):
        out = attention.out + (token + row) * row_step + head * dim * 4
        mean, at = _dot(out, d_out + row * row_step, dim), row * step
        _slopes(s + at, ds + at, shared, _panels(shared) * 2, mean)
        _slopes(s + at + mine, ds + at + mine, first + row + 1, vectors, mean)
    keys, q_at = attention.keys + kv_head * tokens * dim * 4, (head * tokens + token) * dim * 4
    dq = attention.dq + q_at
    _mix(link, rows, first, shared, ds, step, keys, sequence.start, other.start, tokens, dim, dq, dim * 4, scale)
    q = attention.q + q_at
    _gather(link, rows, first, shared, ds, step, q, dim * 4, dim, attention.dk + own, attention.dk + others)


@compiled()
def attend_family(attention, sequences, members, begin, end, head, scale, member):
    """DQ, DK and DV of one head for the sequences `members[begin:end]`; the one that others see comes first."""
    for index in range(begin, end):
        _zero(attention, sequences[members[index]], head)
    for index in range(begin, end):
        number = members[index]
        count = sequences[number].count
        for first in range(0, count, QUERIES):
            _attend_back(attention, sequences, number, head, first, min(QUERIES, count - first), scale, member)
