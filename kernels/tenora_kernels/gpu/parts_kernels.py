"""What adapters have beside low-rank terms: scales of columns, and what a bottleneck needs around shrink and expand.

A program has one row, by its place in the order of slots, so it writes what no other does; rows of the base and rows
whose slot has nothing there are not written.
"""

from __future__ import annotations

import triton.language as tl

from tenora_kernels import flags as bits
from tenora_kernels.gpu.primitives import jit, module_of_block, pick

_PARALLEL = tl.constexpr(bits.PARALLEL)
_WITH_RESIDUAL = tl.constexpr(bits.WITH_RESIDUAL)
_BIAS_OUTSIDE = tl.constexpr(bits.BIAS_OUTSIDE)
_ACTIVATION_BITS = tl.constexpr(bits.ACTIVATION_BITS)
_SILU = tl.constexpr(bits.ACTIVATIONS.index("silu"))
_GELU = tl.constexpr(bits.ACTIVATIONS.index("gelu"))
_GELU_TANH = tl.constexpr(bits.ACTIVATIONS.index("gelu_pytorch_tanh"))
_RELU = tl.constexpr(bits.ACTIVATIONS.index("relu"))


@jit("row", "slots")
def scale(
    y: tl.tensor,
    bias: tl.tensor,
    arena: tl.tensor,
    perm: tl.tensor,
    sorted_slot: tl.tensor,
    ranks: tl.tensor,
    offsets: tl.tensor,
    flags: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    y_stride: tl.tensor,
    c0: tl.tensor,
    c1: tl.tensor,
    c2: tl.tensor,
    w0: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    has_bias: tl.constexpr,
    bn: tl.constexpr,
) -> None:
    """y[row, c_j : c_j + w_j] *= g_j, in float32 and rounded once; where the slot says so the bias is left out.

    Grid: (rows, blocks of bn columns over the modules). `row` is that of the first module's scale.
    """
    position = tl.program_id(0)
    slot = tl.load(sorted_slot + position)
    if slot >= 0:
        j, block = module_of_block(tl.program_id(1), w0, w1, bn)
        entry = (row + j) * slots + slot
        if tl.load(ranks + entry) > 0:
            n = block * bn + tl.arange(0, bn)
            inside = n < pick(j, w0, w1, w2)
            columns = pick(j, c0, c1, c2) + n
            g = tl.load(arena + tl.load(offsets + entry) + n, mask=inside, other=0.0).to(tl.float32)
            target = y + tl.load(perm + position).to(tl.int64) * y_stride + columns
            value = tl.load(target, mask=inside, other=0.0).to(tl.float32)
            if has_bias:
                outside = (tl.load(flags + slot) & _BIAS_OUTSIDE) != 0
                kept = tl.load(bias + columns, mask=inside & outside, other=0.0).to(tl.float32)
                value = kept + g * (value - kept)
            else:
                value = g * value
            tl.store(target, value.to(y.dtype.element_ty), mask=inside)


@jit("row", "slots")
def choose_input(
    out: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
    perm: tl.tensor,
    sorted_slot: tl.tensor,
    ranks: tl.tensor,
    flags: tl.tensor,
    row: tl.tensor,
    slots: tl.tensor,
    y_stride: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    bn: tl.constexpr,
) -> None:
    """out[row] = y[row], x[row] or their sum, as the slot's flags say: a copy, for y is written afterwards.

    Grid: (rows, blocks of bn columns). out is contiguous.
    """
    position = tl.program_id(0)
    slot = tl.load(sorted_slot + position)
    rank = tl.load(ranks + row * slots + slot, mask=slot >= 0, other=0)
    if rank > 0:
        n = tl.program_id(1) * bn + tl.arange(0, bn)
        inside = n < width
        at = tl.load(perm + position).to(tl.int64)
        bits_of_slot = tl.load(flags + slot)
        reads_y, reads_x = (bits_of_slot & _PARALLEL) == 0, (bits_of_slot & (_PARALLEL | _WITH_RESIDUAL)) != 0
        of_y = tl.load(y + at * y_stride + n, mask=inside & reads_y, other=0.0)
        of_x = tl.load(x + at * x_stride + n, mask=inside & reads_x, other=0.0)
        chosen = of_y.to(tl.float32) + of_x.to(tl.float32)
        tl.store(out + at * width + n, chosen.to(out.dtype.element_ty), mask=inside)


@jit()
def _activated(value: tl.tensor, kind: tl.tensor) -> tl.tensor:
    """The function of `flags.ACTIVATIONS[kind]`, element by element; one scalar decides."""
    inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
    found = 2 * tl.sigmoid(2 * value) - 1
    found = tl.where(kind == _SILU, value * tl.sigmoid(value), found)
    found = tl.where(kind == _GELU, 0.5 * value * (1 + tl.math.erf(value * 0.7071067811865476)), found)
    found = tl.where(kind == _GELU_TANH, value * tl.sigmoid(2 * inner), found)
    return tl.where(kind == _RELU, tl.maximum(value, 0.0), found)


@jit("row", "inner_row", "slots", "plane_stride")
def activate(
    planes: tl.tensor,
    arena: tl.tensor,
    sorted_slot: tl.tensor,
    ranks: tl.tensor,
    offsets: tl.tensor,
    flags: tl.tensor,
    row: tl.tensor,
    inner_row: tl.tensor,
    slots: tl.tensor,
    plane_stride: tl.tensor,
    width: tl.tensor,
    splits: tl.constexpr,
    rb: tl.constexpr,
) -> None:
    """The first plane becomes f(S + b_d), S the sum of all planes.

    Grid: (rows, blocks of rb ranks).
    """
    position = tl.program_id(0)
    slot = tl.load(sorted_slot + position)
    if slot >= 0:
        rank = tl.load(ranks + row * slots + slot)
        r = tl.program_id(1) * rb + tl.arange(0, rb)
        inside = r < rank
        at = planes + position * width + r
        total = tl.load(at, mask=inside, other=0.0)
        for split in tl.static_range(1, splits):
            total += tl.load(at + split * plane_stride, mask=inside, other=0.0)
        entry = inner_row * slots + slot
        biased = inside & (tl.load(ranks + entry) > 0)
        total += tl.load(arena + tl.load(offsets + entry) + r, mask=biased, other=0.0).to(tl.float32)
        tl.store(at, _activated(total, tl.load(flags + slot) & _ACTIVATION_BITS), mask=inside)


@jit("row", "outer_row", "slots")
def add_outer(
    y: tl.tensor,
    arena: tl.tensor,
    perm: tl.tensor,
    sorted_slot: tl.tensor,
    ranks: tl.tensor,
    scaling: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    outer_row: tl.tensor,
    slots: tl.tensor,
    y_stride: tl.tensor,
    width: tl.tensor,
    bn: tl.constexpr,
) -> None:
    """y[row] += s · b_u, s the bottleneck's scaling.

    Grid: (rows, blocks of bn columns).
    """
    position = tl.program_id(0)
    slot = tl.load(sorted_slot + position)
    if slot >= 0:
        entry = outer_row * slots + slot
        if (tl.load(ranks + entry) > 0) & (tl.load(ranks + row * slots + slot) > 0):
            n = tl.program_id(1) * bn + tl.arange(0, bn)
            inside = n < width
            b = tl.load(arena + tl.load(offsets + entry) + n, mask=inside, other=0.0).to(tl.float32)
            target = y + tl.load(perm + position).to(tl.int64) * y_stride + n
            value = tl.load(target, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(scaling + row * slots + slot) * b
            tl.store(target, value.to(y.dtype.element_ty), mask=inside)
