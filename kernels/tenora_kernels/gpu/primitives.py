"""What the Triton kernels share: the decorator, the two kinds of dot product, and the walk over split-K planes.

A kernel sees its tensors as pointers. All kernels use these names:

- `perm`: rows in slot order; a *tile* is a run of at most BM positions of `perm` that share a slot.
- `planes`: float32 [splits, modules, positions, width]; plane k holds the part of S = x·Aᵀ that split k has summed.
  They are indexed by position, so the rows of a tile lie side by side.
- `ranks`, `scaling`, `offsets`: the device mirrors of `LoraTables`, [table rows, slots].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def jit(*unspecialized: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, typed. `unspecialized` names integers whose values (1, multiples of 16) must not cause builds."""

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(do_not_specialize=list(unspecialized))(function)

    return decorate


@jit()
def dot_low(a: tl.tensor, b: tl.tensor, acc: tl.tensor, cast: tl.constexpr) -> tl.tensor:
    """acc + a·b in float32. `cast`: a and b differ in type, or the interpreter runs, which multiplies raw bf16 bits."""
    if cast:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit()
def dot_planes(s: tl.tensor, w: tl.tensor, acc: tl.tensor, terms: tl.constexpr, cast: tl.constexpr) -> tl.tensor:
    """acc + s·w for a float32 s, without rounding s to the type of w.

    Args:
        s: float32 [M, R].
        w: [R, N] of any type.
        acc: float32 [M, N].
        terms: for a 2-byte w, 2 or 3: s is split into that many bf16 parts (16 or 24 bits), each multiplied on the
            tensor cores. A fp16 w is split too: bf16 has its range, and two parts have its bits; a fp16 s would
            overflow. 0, for a float32 w: one product in float32.
        cast: as in `dot_low`.
    """
    if terms == 0:
        acc = tl.dot(s, w.to(tl.float32), acc, input_precision="ieee")
    elif w.dtype == tl.float16:
        wide = w.to(tl.float32)
        w_high = wide.to(tl.bfloat16)
        acc = _dot_split(s, (wide - w_high.to(tl.float32)).to(tl.bfloat16), acc, terms - 1, cast)
        acc = _dot_split(s, w_high, acc, terms, cast)
    else:
        acc = _dot_split(s, w, acc, terms, cast)
    return acc


@jit()
def _dot_split(s: tl.tensor, w: tl.tensor, acc: tl.tensor, terms: tl.constexpr, cast: tl.constexpr) -> tl.tensor:
    """acc + s·w for a bf16 w, s in `terms` bf16 parts, the smallest first."""
    high = s.to(tl.bfloat16)
    if terms >= 2:
        rest = s - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        if terms == 3:
            acc = dot_low((rest - middle.to(tl.float32)).to(tl.bfloat16), w, acc, cast)
        acc = dot_low(middle, w, acc, cast)
    return dot_low(high, w, acc, cast)


@jit()
def sum_planes(
    planes: tl.tensor,
    plane_stride: tl.tensor,
    width: tl.tensor,
    position: tl.tensor,
    live: tl.tensor,
    r: tl.tensor,
    rank: tl.tensor,
    splits: tl.constexpr,
) -> tl.tensor:
    """S at [position, r], summed over the planes in order; 0 where a row is not live or r is not below the rank.

    Reads past the first-level cache: another multiprocessor may have written the planes in this very launch.
    """
    at = planes + position[:, None] * width + r[None, :]
    mask = live[:, None] & (r < rank)[None, :]
    total = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, splits):
        total += tl.load(at + split * plane_stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@jit()
def sum_planes_of_row(
    planes: tl.tensor,
    plane_stride: tl.tensor,
    r: tl.tensor,
    rank: tl.tensor,
    splits: tl.constexpr,
    limit: tl.constexpr,
) -> tl.tensor:
    """`sum_planes` of the one position that `planes` points at; `limit` is a power of two not below `splits`."""
    split = tl.arange(0, limit)
    mask = (split < splits)[:, None] & (r < rank)[None, :]
    at = planes + split[:, None].to(tl.int64) * plane_stride + r[None, :]
    return tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)


@jit()
def pick(j: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor) -> tl.tensor:
    """The j-th of three integers."""
    return tl.where(j == 0, first, tl.where(j == 1, second, third))


@jit()
def module_of_block(block: tl.tensor, w0: tl.tensor, w1: tl.tensor, size: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(module, block within it) of a block of `size` columns, counted over modules of widths w0 and w1 and a third.

    A block never spans two modules; a module of width 0 has none.
    """
    first = tl.cdiv(w0, size)
    second = first + tl.cdiv(w1, size)
    j = (block >= first).to(tl.int32) + (block >= second).to(tl.int32)
    return j, block - pick(j, 0, first, second)


@jit()
def wait_for_launch_before() -> None:
    """Programmatic dependent launch (sm_90 on): until the launch before this one has ended and its writes are seen."""
    tl.extra.cuda.gdc_wait()


@jit()
def launch_dependents() -> None:
    """Programmatic dependent launch (sm_90 on): the next launch may begin when every program of this one is here."""
    tl.extra.cuda.gdc_launch_dependents()
