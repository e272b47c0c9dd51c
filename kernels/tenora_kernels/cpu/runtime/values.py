"""float32 and bfloat16 values at plain addresses, for code that Numba compiles.

A compiled function takes the address of a tensor (`Tensor.data_ptr()`) and a *sample* of its element type: a float32,
or a uint16 that stands for a bfloat16, which NumPy lacks. Handing over an integer is ten times as fast as an array.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import float32, types, uint16
from numba.extending import intrinsic

__all__ = [
    "FAST",
    "SAMPLES",
    "load",
    "peek",
    "poke",
    "rounded",
    "size_of",
    "store",
    "to_bfloat16",
    "to_float",
]

SAMPLES: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
"""The sample that stands for an element type; its keys are the types that the kernels take."""

FAST = {"contract", "nsz", "arcp", "reassoc"}
"""For sums: the compiler may split them into vector lanes. Not `nnan`, `ninf`: what is not finite must stay so."""

_FLOAT, _HALF, _WORD, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def to_float(builder: Any, value: Any) -> Any:
    """IR: a float32 as it is; a bfloat16 (or a vector of them) is the upper half of the same float32."""
    if value.type == _FLOAT or getattr(value.type, "element", None) == _FLOAT:
        return value
    wide, target, shift = _WORD, _FLOAT, cast("int | list[int]", 16)
    if isinstance(value.type, ir.VectorType):
        count = value.type.count
        wide, target, shift = ir.VectorType(_WORD, count), ir.VectorType(_FLOAT, count), [16] * count
    return builder.bitcast(builder.shl(builder.zext(value, wide), ir.Constant(wide, shift)), target)


def to_bfloat16(builder: Any, value: Any) -> Any:
    """IR: a float32 (or a vector of them) rounded to nearest even, as i16; what is not a number stays one."""
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    word, half = (ir.VectorType(kind, count) if count else kind for kind in (_WORD, _HALF))

    def constant(number: int) -> Any:
        return ir.Constant(word, [number] * count if count else number)

    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    nearest = builder.lshr(builder.add(builder.add(bits, constant(0x7FFF)), odd), constant(16))
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, constant(0x7FFFFFFF)), constant(0x7F800000))
    return builder.trunc(builder.select(is_nan, constant(0x7FC0), nearest), half)


def _element(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """IR: a pointer to element `index` at `address`."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def load(typing: Any, address: Any, index: Any, sample: Any) -> Any:
    """float32: element `index` of the sample's type at `address`."""

    def codegen(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = _HALF if signature.args[2] == uint16 else _FLOAT
        return to_float(builder, builder.load(_element(builder, args[0], args[1], kind)))

    return float32(types.intp, types.intp, sample), codegen


@intrinsic
def store(typing: Any, address: Any, index: Any, value: Any, sample: Any) -> Any:
    """Write a float32 as element `index` of the sample's type at `address`, rounded to nearest even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        is_bf16 = signature.args[3] == uint16
        value = to_bfloat16(builder, args[2]) if is_bf16 else args[2]
        builder.store(value, _element(builder, args[0], args[1], _HALF if is_bf16 else _FLOAT))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, float32, sample), codegen


@intrinsic
def rounded(typing: Any, value: Any, sample: Any) -> Any:
    """float32: the value after a trip through the sample's type."""

    def codegen(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return to_float(builder, to_bfloat16(builder, args[0])) if signature.args[1] == uint16 else args[0]

    return float32(float32, sample), codegen


@intrinsic
def peek(typing: Any, address: Any, index: Any, sample: Any) -> Any:
    """Element `index` of the sample's type at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(signature.args[2])
        return builder.load(builder.gep(builder.inttoptr(args[0], kind.as_pointer()), [args[1]]))

    return sample(types.intp, types.intp, sample), codegen


@intrinsic
def poke(typing: Any, address: Any, index: Any, value: Any) -> Any:
    """Write int64 element `index` at an address."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], _I64.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.int64), codegen


@intrinsic
def size_of(typing: Any, sample: Any) -> Any:
    """Bytes of an element of the sample's type."""

    def codegen(_context: Any, _builder: Any, signature: Any, _args: Any) -> Any:
        return ir.Constant(_I64, signature.args[0].bitwidth // 8)

    return types.int64(sample), codegen
