"""Activations of float32 numbers, and act(gate) · up on rows of them, in place of the gate."""

from __future__ import annotations

from math import erf, exp
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.values import load, store
from tenora_kernels.cpu.runtime.vectors import LANES, Vectors

__all__ = ["ACTIVATIONS", "activate", "curve"]

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
"""Numbers of a gate's activations, by their names in transformers' configurations: places in `flags.ACTIVATIONS`."""

_ROOT_HALF, _TANH_SCALE, _TANH_CUBE = 0.7071067811865476, 0.7978845608028654, 0.044715


@intrinsic
def _silu(typing: Any, gate: Any, up: Any, vectors: Any) -> Any:  # numba's own signature
    """gate = gate / (1 + e^-gate) · up, so many vectors at two addresses."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        code = Vectors(builder)
        # Beyond 88 e^x is no float32; there x · sigmoid(x) is 0 to 37 digits.
        limit, one = code.constant(88.0), code.constant(1.0)
        with cgutils.for_range(builder, args[2]) as loop:
            offset = builder.mul(loop.index, ir.Constant(ir.IntType(64), 4 * LANES))
            place = builder.add(args[0], offset)
            value = code.load(place)
            negative = builder.fneg(value)
            # Written so that a NaN is not replaced by the limit.
            negative = builder.select(builder.fcmp_ordered(">", negative, limit), limit, negative)
            result = builder.fdiv(value, builder.fadd(one, code.exp(negative)))
            code.store(builder.fmul(result, code.load(builder.add(args[1], offset))), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@compiled()
def curve(x, kind):
    """An activation of one number; kind is a place in `flags.ACTIVATIONS`."""
    if kind == 0:
        return x / (float32(1) + float32(exp(-x)))
    if kind == 1:
        return float32(0.5) * x * (float32(1) + float32(erf(x * float32(_ROOT_HALF))))
    if kind == 2:
        inner = float32(_TANH_SCALE) * (x + float32(_TANH_CUBE) * x * x * x)
        return float32(0.5) * x * (float32(1) + np.tanh(inner))
    if kind == 3:
        return max(x, float32(0))
    return np.tanh(x)


@compiled()
def activate(gate, up, columns, kind):
    """gate[0:columns] = act(gate) · up at two addresses; columns is a multiple of LANES, kind one of ACTIVATIONS."""
    if kind == 0:
        _silu(gate, up, columns // LANES)
        return
    for i in range(columns):
        store(gate, i, curve(load(gate, i, float32(0)), kind) * load(up, i, float32(0)), float32(0))
