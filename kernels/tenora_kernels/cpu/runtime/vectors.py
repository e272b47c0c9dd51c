"""The vocabulary of the inner loops: vectors of float32 and a few words of control, written as LLVM code.

Numba compiles what is written here with the function around it, so that nothing depends on an auto-vectoriser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from tenora_kernels.cpu.runtime.levels import target_features
from tenora_kernels.cpu.runtime.values import to_bfloat16, to_float

__all__ = ["LANES", "Vectors", "accumulators", "float_at", "integer", "multiply_add", "prefetch", "switch"]

LANES = 16 if target_features().get("avx512f", False) else 8
"""float32 values in a vector."""

_FLOAT, _HALF, _WORD, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()


class Vectors:
    """Writes vector code of one width into a function that Numba is building."""

    def __init__(self, builder: Any, lanes: int = LANES) -> None:
        self.builder = builder
        self.lanes = lanes
        self.kind = ir.VectorType(_FLOAT, lanes)
        self.integers = ir.VectorType(_WORD, lanes)

    def load(self, address: Any, is_bf16: bool = False) -> Any:
        """A vector from an address that need not be aligned to it."""
        kind = ir.VectorType(_HALF, self.lanes) if is_bf16 else self.kind
        place = self.builder.inttoptr(address, kind.as_pointer())
        return to_float(self.builder, self.builder.load(place, align=2 if is_bf16 else 4))

    def store(self, value: Any, address: Any, is_bf16: bool = False) -> None:
        """A vector to an address that need not be aligned to it; rounded to nearest even for bfloat16."""
        if is_bf16:
            value = to_bfloat16(self.builder, value)
        place = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, place, align=2 if is_bf16 else 4)

    def constant(self, value: float) -> Any:
        """One number in every lane, known now."""
        return ir.Constant(self.kind, [value] * self.lanes)

    def broadcast(self, value: Any) -> Any:
        """The same number in every lane."""
        kind = ir.VectorType(value.type, self.lanes)
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(_WORD, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.integers, None))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a · b + c, rounded once; llvmlite's own builder does it for scalars only."""
        kind = ir.FunctionType(self.kind, [self.kind] * 3)
        name = f"llvm.fma.v{self.lanes}f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def larger(self, a: Any, b: Any) -> Any:
        """The larger one in every lane; b where a is not a number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def fold(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """One number from all the lanes, half against half."""
        count = self.lanes
        undefined = ir.Constant(self.kind, ir.Undefined)
        while count > 1:
            count //= 2
            upper = [count + lane if lane < count else 0 for lane in range(self.lanes)]
            moved = self.builder.shuffle_vector(value, undefined, ir.Constant(self.integers, upper))
            value = combine(value, moved)
        return self.builder.extract_element(value, ir.Constant(_WORD, 0))

    def exp(self, x: Any) -> Any:
        """e^x for x ≤ 88, within 2 ulp; 0 … 1.2e-38 below -87. Method and coefficients: Cephes (Moshier), expf.c."""
        builder = self.builder
        floor = self.constant(-87.0)
        x = builder.select(builder.fcmp_ordered("<", x, floor), floor, x)
        # Adding 1.5 · 2^23 leaves the nearest integer in the low bits.
        magic = self.constant(12582912.0)
        shifted = self.fma(x, self.constant(1.44269504088896341), magic)
        power = builder.fsub(shifted, magic)
        r = self.fma(power, self.constant(-0.693359375), x)
        r = self.fma(power, self.constant(2.12194440e-4), r)
        series = self.constant(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            series = self.fma(series, r, self.constant(term))
        series = builder.fadd(self.fma(builder.fmul(r, r), series, r), self.constant(1.0))
        bits = builder.shl(builder.bitcast(shifted, self.integers), ir.Constant(self.integers, [23] * self.lanes))
        # The low bits of 1.5 · 2^23 are zero, so the shift leaves n · 2^23: what makes 2^n of the exponent's 1.
        two_to_n = builder.bitcast(builder.add(bits, ir.Constant(self.integers, [127 << 23] * self.lanes)), self.kind)
        return builder.fmul(series, two_to_n)


def integer(value: int) -> Any:
    """A constant int64: what addresses, strides and counts are."""
    return ir.Constant(_I64, value)


def float_at(builder: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""
    return builder.inttoptr(address, _FLOAT.as_pointer())


def switch(builder: Any, number: Any, cases: Iterable[int], emit: Callable[[int], None]) -> None:
    """Run the code that `emit` writes for what `number` is at run time; none for what is not one of the cases."""
    done = builder.append_basic_block("cases.done")
    branches = builder.switch(number, done)
    for case in cases:
        block = builder.append_basic_block(f"case.{case}")
        branches.add_case(integer(case), block)
        with builder.goto_block(block):
            emit(case)
            builder.branch(done)
    builder.position_at_end(done)


def prefetch(builder: Any, address: Any, *, near: bool = False) -> None:
    """Ask for a line in the second-level cache, or in the first-level one if it is needed `near` in time."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _WORD, _WORD, _WORD])
    name = "llvm.prefetch.p0" if getattr(_BYTES, "is_opaque", False) else "llvm.prefetch.p0i8"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    read, locality, data = (ir.Constant(_WORD, number) for number in (0, 3 if near else 2, 1))
    builder.call(function, [builder.inttoptr(address, _BYTES), read, locality, data])


def accumulators(vectors: Vectors, rows: int, columns: int) -> list[list[Any]]:
    """Places for rows · columns vectors, zero at first; the compiler keeps them in registers."""
    zero = vectors.constant(0.0)
    return [[cgutils.alloca_once_value(vectors.builder, zero) for _ in range(columns)] for _ in range(rows)]


def multiply_add(vectors: Vectors, place: Any, weights: list[Any], sums: list[Any]) -> None:
    """sums += the float32 at address `place` · weights, vector by vector."""
    builder = vectors.builder
    value = vectors.broadcast(builder.load(float_at(builder, place)))
    for weight, total in zip(weights, sums, strict=True):
        builder.store(vectors.fma(value, weight, builder.load(total)), total)
