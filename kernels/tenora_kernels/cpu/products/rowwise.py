"""What training does with single rows of float32: norms and gated activations, forward and backward.

Addresses are in bytes; columns are a multiple of LANES. Sums run over the row alone, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import erf, exp
from typing import Any

import numpy as np
from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.values import FAST, load, store
from tenora_kernels.cpu.runtime.vectors import LANES, Vectors, integer

__all__ = [
    "add_row",
    "gate_backward",
    "gate_forward",
    "inverse_norm",
    "norm_backward",
    "norm_forward",
    "norm_rows",
    "scale_row",
]

_Loads = Sequence[Callable[[], Any]]
_Compute = Callable[[Vectors, _Loads, list[Any]], list[Any]]

_ROOT_HALF, _ROOT_TWO_PI = 0.7071067811865476, 2.5066282746310002
_TANH_SCALE, _TANH_CUBE = 0.7978845608028654, 0.044715


def _elementwise(compute: _Compute) -> Any:
    """An intrinsic that computes up to three rows from up to three rows and two numbers, vector by vector."""

    @intrinsic
    def run(typing, first, second, third, a, b, c, s, t, vectors):
        del typing, first, second, third, a, b, c, s, t, vectors
        signature = types.void(*[types.int64] * 6, types.float32, types.float32, types.int64)

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            code = Vectors(builder)
            numbers = [code.broadcast(value) for value in args[6:8]]
            with cgutils.for_range(builder, args[8]) as loop:
                offset = builder.mul(loop.index, integer(4 * LANES))
                places = [builder.add(address, offset) for address in args[:6]]
                loads = [partial(code.load, place) for place in places[3:]]
                for value, place in zip(compute(code, loads, numbers), places[:3], strict=False):
                    code.store(value, place)
            return context.get_dummy_value()

        return signature, codegen

    return run


def _scaled(code: Vectors, rows: _Loads, numbers: list[Any]) -> list[Any]:
    return [code.builder.fmul(code.builder.fmul(rows[0](), numbers[0]), rows[1]())]


def _norm_slope(code: Vectors, rows: _Loads, numbers: list[Any]) -> list[Any]:
    """s · dy · w - t · x."""
    builder = code.builder
    slope = builder.fmul(builder.fmul(rows[1](), rows[2]()), numbers[0])
    return [builder.fsub(slope, builder.fmul(rows[0](), numbers[1]))]


def _sum(code: Vectors, rows: _Loads, _numbers: list[Any]) -> list[Any]:
    return [code.builder.fadd(rows[0](), rows[1]())]


def _product(code: Vectors, rows: _Loads, numbers: list[Any]) -> list[Any]:
    return [code.builder.fmul(rows[0](), numbers[0])]


def _sigmoid(code: Vectors, x: Any) -> Any:
    """1 / (1 + e^-x). Beyond 88 e^x is no float32; there x · sigmoid(x) is 0 to 37 digits."""
    limit, one = code.constant(88.0), code.constant(1.0)
    negative = code.builder.fneg(x)
    # Written so that a NaN is not replaced by the limit.
    negative = code.builder.select(code.builder.fcmp_ordered(">", negative, limit), limit, negative)
    return code.builder.fdiv(one, code.builder.fadd(one, code.exp(negative)))


def _silu_forward(code: Vectors, rows: _Loads, _numbers: list[Any]) -> list[Any]:
    gate = rows[0]()
    return [code.builder.fmul(code.builder.fmul(gate, _sigmoid(code, gate)), rows[1]())]


def _silu_backward(code: Vectors, rows: _Loads, _numbers: list[Any]) -> list[Any]:
    """silu(gate) · up, and the gradients of gate and up."""
    builder, one = code.builder, code.constant(1.0)
    gate, up, slope = (row() for row in rows)
    sigmoid = _sigmoid(code, gate)
    silu = builder.fmul(gate, sigmoid)
    # silu' = sigmoid · (1 + gate · (1 - sigmoid))
    rise = builder.fmul(sigmoid, code.fma(gate, builder.fsub(one, sigmoid), one))
    return [builder.fmul(silu, up), builder.fmul(builder.fmul(slope, up), rise), builder.fmul(slope, silu)]


_scale_by_row, _slope, _add, _scale = (_elementwise(kind) for kind in (_scaled, _norm_slope, _sum, _product))
_silu, _silu_slopes = _elementwise(_silu_forward), _elementwise(_silu_backward)


@compiled(fastmath=FAST)
def _sum_of_squares(row, columns):
    total = float32(0.0)
    for i in range(columns):
        x = load(row, i, float32(0))
        total += x * x
    return total


@compiled(fastmath=FAST)
def _sum_of_products(x, dy, weight, columns):
    total = float32(0.0)
    for i in range(columns):
        total += load(x, i, float32(0)) * (load(dy, i, float32(0)) * load(weight, i, float32(0)))
    return total


@compiled()
def inverse_norm(x, columns, eps):
    """1 / √(mean(x²) + ε)."""
    return float32(1.0) / np.sqrt(_sum_of_squares(x, columns) / float32(columns) + eps)


@compiled()
def norm_forward(x, weight, columns, eps, out):
    """out = x / √(mean(x²) + ε) · weight."""
    _scale_by_row(out, out, out, x, weight, x, inverse_norm(x, columns, eps), float32(0), columns // LANES)


@compiled()
def norm_rows(piece, x, weight, columns, eps, out):
    """`norm_forward` of the rows of a piece of the stream: piece[2] of them from row piece[1] on."""
    for row in range(piece[1], piece[1] + piece[2]):
        norm_forward(x + row * columns * 4, weight, columns, eps, out + row * columns * 4)


@compiled()
def norm_backward(x, weight, dy, columns, eps, out):
    """out = the gradient of x where dy is that of `norm_forward`'s result."""
    inverse = inverse_norm(x, columns, eps)
    pull = _sum_of_products(x, dy, weight, columns) / float32(columns) * inverse * inverse * inverse
    _slope(out, out, out, x, dy, weight, inverse, pull, columns // LANES)


@compiled()
def add_row(a, b, columns, out):
    """out = a + b."""
    _add(out, out, out, a, b, a, float32(0), float32(0), columns // LANES)


@compiled()
def scale_row(a, factor, columns, out):
    """out = a · factor."""
    _scale(out, out, out, a, a, a, factor, float32(0), columns // LANES)


@compiled()
def _activation(x, kind):
    """An activation other than SiLU and its slope at x, in float32; see `activation.ACTIVATIONS`."""
    if kind == 1:
        share = float32(0.5) * (float32(1) + float32(erf(x * float32(_ROOT_HALF))))
        return x * share, share + x * float32(exp(float32(-0.5) * x * x) / _ROOT_TWO_PI)
    if kind == 2:
        bent = np.tanh(float32(_TANH_SCALE) * (x + float32(_TANH_CUBE) * x * x * x))
        rise = float32(_TANH_SCALE) * (float32(1) + float32(3 * _TANH_CUBE) * x * x)
        half = float32(0.5) * (float32(1) + bent)
        return x * half, half + float32(0.5) * x * (float32(1) - bent * bent) * rise
    # As torch: a NaN stays one, and the slope at 0 is 0.
    return (float32(0), float32(0)) if x <= float32(0) else (x, float32(1))


@compiled()
def gate_forward(gate, up, columns, kind, out):
    """out = act(gate) · up; kind is one of `activation.ACTIVATIONS`."""
    if kind == 0:
        _silu(out, out, out, gate, up, gate, float32(0), float32(0), columns // LANES)
        return
    for i in range(columns):
        value, _ = _activation(load(gate, i, float32(0)), kind)
        store(out, i, value * load(up, i, float32(0)), float32(0))


@compiled()
def gate_backward(gate, up, slope, columns, kind, out, d_gate, d_up):
    """out = act(gate) · up once more, and what its gradient `slope` makes of gate and up.

    `slope` may be the memory of `d_gate` or `d_up`.
    """
    if kind == 0:
        _silu_slopes(out, d_gate, d_up, gate, up, slope, float32(0), float32(0), columns // LANES)
        return
    for i in range(columns):
        value, rise = _activation(load(gate, i, float32(0)), kind)
        pull, other = load(slope, i, float32(0)), load(up, i, float32(0))
        store(out, i, value * other, float32(0))
        store(d_gate, i, pull * other * rise, float32(0))
        store(d_up, i, pull * value, float32(0))
