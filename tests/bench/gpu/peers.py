"""What we are measured against, written from the peers' published grids: not their code, their shape.

SGMV with a maximum rank: weights padded to the pool's highest rank in `[slots, rank, in]` and `[slots, out, rank]`; one
program per (block of rows of the largest segment, split of K) · slot, most of them without work; partial sums through
float32 atomics into a buffer that is cleared first. Three launches per site, 12 per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tenora_kernels.gpu.primitives import jit


@jit("rows")
def sgmv_shrink(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    perm: tl.tensor,
    seg_ptr: tl.tensor,
    rows: tl.tensor,
    k_size: tl.tensor,
    rank: tl.tensor,
    splits: tl.constexpr,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bk: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """out[j, row] += x[row] · weight[j, slot]ᵀ over a split of K; grid (blocks of rows · splits, modules, slots)."""
    slot = tl.program_id(2)
    j = tl.program_id(1)
    start = tl.load(seg_ptr + slot)
    end = tl.load(seg_ptr + slot + 1)
    position = start + tl.program_id(0) // splits * bm + tl.arange(0, bm)
    if start + tl.program_id(0) // splits * bm < end:
        live = position < end
        row = tl.load(perm + position, mask=live, other=0)
        r = tl.arange(0, rb)
        acc = tl.zeros([bm, rb], tl.float32)
        base = weight + (j * tl.num_programs(2) + slot).to(tl.int64) * rank * k_size
        for k_at in range(tl.program_id(0) % splits * bk, k_size, splits * bk):
            k = k_at + tl.arange(0, bk)
            a = tl.load(x + row[:, None] * k_size + k[None, :], mask=live[:, None] & (k < k_size)[None, :], other=0.0)
            b = tl.load(
                base + r[:, None] * k_size + k[None, :], mask=(r < rank)[:, None] & (k < k_size)[None, :], other=0.0
            )
            if cast:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, tl.trans(b), acc)
        at = out + (j * rows + row)[:, None] * rank + r[None, :]
        tl.atomic_add(at, acc, mask=live[:, None] & (r < rank)[None, :])


@jit("rows")
def sgmv_expand(
    y: tl.tensor,
    s: tl.tensor,
    weight: tl.tensor,
    perm: tl.tensor,
    seg_ptr: tl.tensor,
    starts: tl.tensor,
    widths: tl.tensor,
    rows: tl.tensor,
    y_stride: tl.tensor,
    rank: tl.tensor,
    widest: tl.tensor,
    bm: tl.constexpr,
    rb: tl.constexpr,
    bn: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """y[row, slice j] += s[j, row] · weight[j, slot]ᵀ; grid (blocks of rows · blocks of columns, modules, slots)."""
    slot = tl.program_id(2)
    j = tl.program_id(1)
    start = tl.load(seg_ptr + slot)
    end = tl.load(seg_ptr + slot + 1)
    width = tl.load(widths + j)
    blocks = tl.cdiv(widest, bn)
    first = start + tl.program_id(0) // blocks * bm
    n = tl.program_id(0) % blocks * bn + tl.arange(0, bn)
    if (first < end) & (tl.program_id(0) % blocks * bn < width):
        position = first + tl.arange(0, bm)
        live = position < end
        row = tl.load(perm + position, mask=live, other=0)
        r = tl.arange(0, rb)
        a = tl.load(
            s + (j * rows + row)[:, None] * rank + r[None, :], mask=live[:, None] & (r < rank)[None, :], other=0.0
        )
        base = weight + (j * tl.num_programs(2) + slot).to(tl.int64) * widest * rank
        b = tl.load(base + n[None, :] * rank + r[:, None], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        if cast:
            b = b.to(tl.float32)
        acc = tl.dot(a.to(b.dtype), b)
        at = y + row[:, None] * y_stride + tl.load(starts + j) + n[None, :]
        mask = live[:, None] & (n < width)[None, :]
        tl.store(at, (tl.load(at, mask=mask, other=0.0) + acc).to(y.dtype.element_ty), mask=mask)


@dataclass
class Sgmv:
    """One layer's padded weights and this step's rows.

    Attributes:
        a: [modules, slots, rank, in].
        b: [modules, slots, widest, rank].
        perm: int32 [T], rows by slot.
        seg_ptr: int32 [slots + 1], by slot: an unused one has an empty range.
        starts: int32 [modules], first columns.
        widths: int32 [modules], numbers of columns.
        longest: rows of the longest segment, which the grid is made for.
    """

    a: Tensor
    b: Tensor
    perm: Tensor
    seg_ptr: Tensor
    starts: Tensor
    widths: Tensor
    longest: int

    def add(self, y: Tensor, x: Tensor, sums: Tensor) -> None:
        """Add the term to y. `sums`: float32 [modules, T, rank], cleared here as the peers clear theirs."""
        modules, slots, rank, k_size = self.a.shape
        widest, rows, cast = self.b.shape[2], x.shape[0], x.device.type == "cpu"
        rb = max(16, triton.next_power_of_2(rank))
        row_blocks = triton.cdiv(self.longest, 16)
        sums.zero_()
        splits = 8 if rows <= 128 else 1
        sgmv_shrink[(row_blocks * splits, modules, slots)](
            x, self.a, sums, self.perm, self.seg_ptr, rows, k_size, rank, splits=splits, bm=16, rb=rb, bk=128, cast=cast
        )
        sgmv_expand[(row_blocks * triton.cdiv(widest, 128), modules, slots)](
            y,
            sums,
            self.b,
            self.perm,
            self.seg_ptr,
            self.starts,
            self.widths,
            rows,
            y.stride(0),
            rank,
            widest,
            bm=16,
            rb=rb,
            bn=128,
            cast=cast,
        )


@dataclass
class Grouped:
    """torch's `grouped_mm` over the adapters in use, padded to their highest rank; rows gathered and scattered.

    Attributes:
        a: per module [groups, in, rank].
        b: per module [groups, rank, out], scaling in it.
        perm: int64 [n], rows by adapter.
        ends: int32 [groups].
        slices: columns of y per module.
    """

    a: list[Tensor]
    b: list[Tensor]
    perm: Tensor
    ends: Tensor
    slices: tuple[tuple[int, int], ...]

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the term to y."""
        rows = x.index_select(0, self.perm)
        for a, b, (start, stop) in zip(self.a, self.b, self.slices, strict=True):
            term = F.grouped_mm(F.grouped_mm(rows, a, offs=self.ends), b, offs=self.ends)
            y[:, start:stop].index_add_(0, self.perm, term)
