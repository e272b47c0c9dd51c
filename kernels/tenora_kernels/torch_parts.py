"""What adapters have beside low-rank terms, in plain torch: scales of columns, and bottlenecks after a block.

Runs on every device that torch runs on; a segment of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tenora_kernels.flags import ACTIVATION_BITS, ACTIVATIONS, BIAS_OUTSIDE, PARALLEL, WITH_RESIDUAL
from tenora_kernels.layout import BottleneckSite, LoraBatch, LoraSegments, LoraSite, LoraTables, accumulation_dtype

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}


def activation_of(flags: int) -> Callable[[Tensor], Tensor]:
    """The function between the two matrices of a slot's bottlenecks."""
    return _FUNCTIONS[ACTIVATIONS[flags & ACTIVATION_BITS]]


def read_by(flags: int, y: Tensor, x: Tensor) -> Tensor:
    """What a slot's bottlenecks read, of a block's output y and the residual stream x before it."""
    if flags & PARALLEL:
        return x
    return y + x if flags & WITH_RESIDUAL else y


def scale_forward(y: Tensor, site: LoraSite, batch: LoraBatch, bias: Tensor | None) -> None:
    """Multiply y [T, out] in place with the scales of each row's slot; see `tenora_kernels.ops.scale_columns`."""
    for rows, slot in _segments(batch.segments):
        for columns, row, kept in _scales(site, batch.tables, slot, bias):
            scale = batch.tables.a(row, slot)[0]
            wide = y[rows, columns].to(accumulation_dtype(y.dtype, scale.dtype))
            scaled = wide * scale if kept is None else kept + scale * (wide - kept)
            y[rows, columns] = scaled.to(y.dtype)


def scale_backward(dy: Tensor, y: Tensor, site: LoraSite, batch: LoraBatch, bias: Tensor | None) -> Tensor:
    """From the gradient of the scaled y to that of y, and add that of the scales to `tables.grad`.

    Args:
        dy: [T, out].
        y: [T, out], before it was scaled.
    """
    tables, below = batch.tables, dy.clone()
    for rows, slot in _segments(batch.segments):
        for columns, row, kept in _scales(site, tables, slot, bias):
            scale = tables.a(row, slot)[0]
            wide = dy[rows, columns].to(accumulation_dtype(dy.dtype, scale.dtype))
            below[rows, columns] = (wide * scale).to(dy.dtype)
            if tables.grad is not None:
                scaled = y[rows, columns] if kept is None else y[rows, columns] - kept
                tables.grad_a(row, slot)[0].add_((wide * scaled).sum(dim=0))
    return below


class Bottleneck(NamedTuple):
    """The weights of one slot's bottleneck: down [r, H], up, transposed, [r, H], and biases [r] and [H] or None."""

    down: Tensor
    up: Tensor
    inner: Tensor | None
    outer: Tensor | None

    @classmethod
    def of(cls, site: BottleneckSite, tables: LoraTables, slot: int, *, gradient: bool = False) -> Bottleneck | None:
        """That of a slot, or the places of its gradient; None if it has none there."""
        if not tables.rank(site.row, slot):
            return None
        a, bt = (tables.grad_a, tables.grad_bt) if gradient else (tables.a, tables.bt)
        inner = a(site.inner_row, slot)[:, 0] if tables.rank(site.inner_row, slot) else None
        outer = a(site.outer_row, slot)[0] if tables.rank(site.outer_row, slot) else None
        return cls(a(site.row, slot), bt(site.row, slot), inner, outer)

    def to(self, dtype: torch.dtype) -> Bottleneck:
        """In another type, as leaves of a graph of their own."""
        down, up, *biases = (None if part is None else part.detach().to(dtype).requires_grad_() for part in self)
        if down is None or up is None:
            raise ValueError("a bottleneck has both matrices.")
        return Bottleneck(down, up, *biases)

    def __call__(self, x: Tensor, flags: int) -> Tensor:
        """U · f(D · x + b_d) + b_u of the rows [n, H]."""
        inner = x @ self.down.t()
        if self.inner is not None:
            inner = inner + self.inner
        outer = activation_of(flags)(inner) @ self.up
        return outer if self.outer is None else outer + self.outer


def bottleneck_forward(y: Tensor, x: Tensor, site: BottleneckSite, batch: LoraBatch) -> None:
    """Add to y [T, H] in place what each row's slot has there; see `tenora_kernels.ops.add_bottleneck`."""
    tables = batch.tables
    for rows, slot in _segments(batch.segments):
        if (bottleneck := Bottleneck.of(site, tables, slot)) is not None:
            flags = int(tables.flags[slot])
            dtype = accumulation_dtype(y.dtype, bottleneck.down.dtype)
            own, stream = y[rows].to(dtype), x[rows].to(dtype)
            made = bottleneck.to(dtype)(read_by(flags, own, stream), flags)
            y[rows] = (own + tables.scale(site.row, slot) * made).to(y.dtype)


def bottleneck_backward(
    dy: Tensor, y: Tensor, x: Tensor, site: BottleneckSite, batch: LoraBatch
) -> tuple[Tensor, Tensor]:
    """From the gradient of the sum to those of y and x, both [T, H], and add those of the weights to `tables.grad`.

    Args:
        dy: [T, H].
        y, x: [T, H], what the forward pass was given.
    """
    tables = batch.tables
    d_y, d_x = dy.clone(), torch.zeros_like(x)
    for rows, slot in _segments(batch.segments):
        if (stored := Bottleneck.of(site, tables, slot)) is None:
            continue
        flags = int(tables.flags[slot])
        dtype = accumulation_dtype(dy.dtype, stored.down.dtype)
        given = read_by(flags, y[rows].detach().to(dtype), x[rows].detach().to(dtype))
        bottleneck, given = stored.to(dtype), given.requires_grad_()
        with torch.enable_grad():
            made = tables.scale(site.row, slot) * bottleneck(given, flags)
        parts = [part for part in bottleneck if part is not None]
        to_given, *to_parts = torch.autograd.grad(made, [given, *parts], dy[rows].to(dtype))
        for below in (*(() if flags & PARALLEL else (d_y,)), *((d_x,) if flags & (PARALLEL | WITH_RESIDUAL) else ())):
            below[rows] += to_given.to(below.dtype)
        if tables.grad is not None:
            places = Bottleneck.of(site, tables, slot, gradient=True) or ()
            for place, gradient in zip((part for part in places if part is not None), to_parts, strict=True):
                place.add_(gradient)
    return d_y, d_x


def _scales(
    site: LoraSite, tables: LoraTables, slot: int, bias: Tensor | None
) -> Iterator[tuple[slice, int, Tensor | None]]:
    """Columns, row in the tables, and what of y is not scaled, of each module of a site that a slot scales."""
    if site.scale_row is None:
        return
    outside = bool(int(tables.flags[slot]) & BIAS_OUTSIDE)
    for j, (left, right) in enumerate(site.slices):
        if tables.rank(site.scale_row + j, slot):
            kept = bias[left:right].to(accumulation_dtype(bias.dtype)) if outside and bias is not None else None
            yield slice(left, right), site.scale_row + j, kept


def _segments(segments: LoraSegments) -> Iterator[tuple[Tensor | slice, int]]:
    """Rows and slot of each segment."""
    for i, slot in enumerate(segments.seg_slot):
        start, stop = segments.seg_ptr[i], segments.seg_ptr[i + 1]
        first = segments.first
        yield segments.perm[start:stop] if first is None else slice(first + start, first + stop), slot
