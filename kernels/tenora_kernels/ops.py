"""The ops of serving and training that depend on a row's adapter, with their gradients. Backends are chosen here only.

`add_lora` is the low-rank op; `scale_columns` and `add_bottleneck` are what other kinds of adapters have beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenora_kernels import torch_backend, torch_parts
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.flags import BOTTLENECKS, SCALES
from tenora_kernels.layout import BottleneckSite, LoraBatch, LoraSite, LoraTables, accumulation_dtype


class Backend(Protocol):
    """What an implementation offers; `tenora_kernels.torch_backend` states the semantics of both functions."""

    def forward(self, y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> None:
        """Add the low-rank term to y in place."""

    def backward(self, dy: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, dx: Tensor | None) -> None:
        """Add the gradients to dx and to `batch.tables.grad`, in place."""


def select_backend(y: Tensor, x: Tensor, tables: LoraTables) -> Backend:
    """The implementation for a call: compiled for the CPU, Triton for CUDA, plain torch for whatever they do not take.

    Rank and shape choose further inside of each.
    """
    if y.is_cuda:
        return torch_backend if accumulation_dtype(y.dtype, x.dtype, tables.arena.dtype) == torch.float64 else _triton()
    return lora if lora.supports(y, x, tables) else torch_backend


@cache
def _triton() -> Backend:
    """Imported when it is needed: Triton takes a second, and a machine without a GPU may lack it."""
    from tenora_kernels.gpu import backend  # noqa: PLC0415  # see above

    return backend


class Parts(Protocol):
    """What an implementation offers of the other two ops, in place."""

    def scale_forward(self, y: Tensor, site: LoraSite, batch: Any, bias: Tensor | None) -> None:
        """Multiply the columns of y."""

    def bottleneck_forward(self, y: Tensor, x: Tensor, site: BottleneckSite, batch: Any) -> None:
        """Add bottlenecks to y."""


def _parts_of(batch: LoraBatch) -> Parts:
    """Triton where the rows are known on the device alone, else plain torch."""
    return _triton_parts() if batch.on_device else torch_parts


@cache
def _triton_parts() -> Parts:
    """See `_triton`."""
    from tenora_kernels.gpu import parts  # noqa: PLC0415  # see there

    return parts


def add_lora(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch | None) -> Tensor:
    """`y[t, slice_j] += c · (x[t] · Aᵀ) · Bᵀ` with the A, B, c of row t's slot, for every module j of the site.

    Sums are float32 (float64 if any operand is float64). Rows without an adapter are untouched, to the bit; so are
    the columns of modules that a row's adapter skips. Any mix of ranks, slots and row order; equal arguments give
    equal bits.

    Args:
        y: [T, out], the frozen projection's output. Changed in place, unless a gradient is needed.
        x: [T, in], the projection's input, on the device of y. Must not alias y.
        site: that y belongs to.
        batch: the step's tables and segments; None if no row has an adapter.

    Returns:
        y itself if no gradient is needed, else a new tensor. A gradient is needed when grad mode is on and x or y
        requires one or `batch.tables.grad` is set; then the backward pass gives dX, passes dY through, and **adds** dA
        and dBᵀ to `batch.tables.grad`. The arena must not change between the two passes: autograd then raises
        RuntimeError.

    Raises:
        ValueError: if shapes do not belong together.

    Source: LoRA, arXiv:2106.09685; batched over adapters as SGMV, arXiv:2310.18547.
    """
    if batch is None:
        return y
    _check_shapes(y, x, site, batch)
    tables = batch.tables
    if torch.is_grad_enabled() and (tables.grad is not None or x.requires_grad or y.requires_grad):
        # Autograd calls backward only if an input requires a gradient; below the first layer none does.
        anchor = torch.empty(0, requires_grad=tables.grad is not None)
        result: Tensor = _AddLora.apply(y, x, tables.arena, anchor, site, batch)  # type: ignore[no-untyped-call]  # torch
        return result
    select_backend(y, x, tables).forward(y, x, site, batch)
    return y


def scale_columns(y: Tensor, site: LoraSite, batch: LoraBatch | None, bias: Tensor | None = None) -> Tensor:
    """`y[t, slice_j] = g ∘ y[t, slice_j]` with the scale g of row t's slot, for every module j of the site.

    Where the slot has BIAS_OUTSIDE the projection's bias is not scaled: y = b + g ∘ (y - b). Rows and modules without
    a scale are untouched, to the bit.

    Args:
        y: [T, out], a projection's output with its low-rank terms. Changed in place, unless a gradient is needed.
        site: that y belongs to.
        batch: the step's tables and segments; None if no row has an adapter.
        bias: [out], of the projection; None if it has none.

    Returns:
        y itself if no gradient is needed, else a new tensor; when one is, see `add_lora`. The backward pass **adds** dg
        to `batch.tables.grad`.

    Source: (IA)³, arXiv:2205.05638; DoRA, arXiv:2402.09353, with g = m / ‖W + cBA‖ of each row.
    """
    if batch is None or not batch.flags & SCALES or site.scale_row is None:
        return y
    tables = batch.tables
    if torch.is_grad_enabled() and (tables.grad is not None or y.requires_grad):
        anchor = torch.empty(0, requires_grad=tables.grad is not None)
        result: Tensor = _ScaleColumns.apply(y, tables.arena, anchor, site, batch, bias)  # type: ignore[no-untyped-call]  # torch
        return result
    _parts_of(batch).scale_forward(y, site, batch, bias)
    return y


def add_bottleneck(y: Tensor, x: Tensor, site: BottleneckSite, batch: LoraBatch | None) -> Tensor:
    """`y[t] += s · (U · f(D · h + b_d) + b_u)` with the bottleneck of row t's slot.

    h is y[t] itself, or x[t] where the slot has PARALLEL, or y[t] + x[t] where it has WITH_RESIDUAL. Rows without a
    bottleneck are untouched, to the bit.

    Args:
        y: [T, H], a block's output before it is added to the residual. Changed in place, unless a gradient is needed.
        x: [T, H], the residual stream before the block. Must not alias y.
        site: the block's.
        batch: the step's tables and segments; None if no row has an adapter.

    Returns:
        y itself if no gradient is needed, else a new tensor; when one is, see `add_lora`. The backward pass **adds**
        the weights' gradients to `batch.tables.grad`.

    Source: adapters, arXiv:1902.00751 (h = y, after attention and MLP) and arXiv:2005.00247 (h = y + x, after the MLP);
    parallel ones, arXiv:2110.04366 (h = x). What they read in a pre-norm decoder is what AdapterHub's library does.
    """
    if batch is None or not batch.flags & BOTTLENECKS:
        return y
    tables = batch.tables
    if torch.is_grad_enabled() and (tables.grad is not None or x.requires_grad or y.requires_grad):
        anchor = torch.empty(0, requires_grad=tables.grad is not None)
        result: Tensor = _AddBottleneck.apply(y, x, tables.arena, anchor, site, batch)  # type: ignore[no-untyped-call]  # torch
        return result
    _parts_of(batch).bottleneck_forward(y, x, site, batch)
    return y


def _check_shapes(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> None:
    rows = batch.segments.rows
    if x.shape != (rows, site.in_features) or y.dim() != 2 or y.shape[0] != rows or y.shape[1] < site.slices[-1][1]:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit a batch of {rows} rows at a site with "
            f"{site.in_features} inputs and slices {site.slices}."
        )


class _AddLora(torch.autograd.Function):
    """`add_lora` out of place, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, arena: Tensor, anchor: Tensor, site: LoraSite, batch: LoraBatch
    ) -> Tensor:
        del anchor
        # Saving the arena copies nothing, and autograd checks that nobody wrote to it before the backward pass.
        ctx.save_for_backward(x, arena)
        ctx.site, ctx.batch = site, batch
        out = y.clone()
        select_backend(out, x, batch.tables).forward(out, x, site, batch)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, arena = ctx.saved_tensors
        wants_dy, wants_dx = ctx.needs_input_grad[:2]
        dtype = accumulation_dtype(dy.dtype, x.dtype, arena.dtype)
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device) if wants_dx else None
        select_backend(dy, x, ctx.batch.tables).backward(dy, x, ctx.site, ctx.batch, dx)
        return (dy if wants_dy else None, None if dx is None else dx.to(x.dtype), None, None, None, None)


class _ScaleColumns(torch.autograd.Function):
    """`scale_columns` out of place, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, arena: Tensor, anchor: Tensor, site: LoraSite, batch: LoraBatch, bias: Tensor | None
    ) -> Tensor:
        del anchor
        ctx.save_for_backward(y, arena)
        ctx.site, ctx.batch, ctx.bias = site, batch, bias
        out = y.clone()
        torch_parts.scale_forward(out, site, batch, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, _ = ctx.saved_tensors
        below = torch_parts.scale_backward(dy, y, ctx.site, ctx.batch, ctx.bias)
        return (below if ctx.needs_input_grad[0] else None, None, None, None, None, None)


class _AddBottleneck(torch.autograd.Function):
    """`add_bottleneck` out of place, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, arena: Tensor, anchor: Tensor, site: BottleneckSite, batch: LoraBatch
    ) -> Tensor:
        del anchor
        ctx.save_for_backward(y, x, arena)
        ctx.site, ctx.batch = site, batch
        out = y.clone()
        torch_parts.bottleneck_forward(out, x, site, batch)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, x, _ = ctx.saved_tensors
        d_y, d_x = torch_parts.bottleneck_backward(dy, y, x, ctx.site, ctx.batch)
        wants_y, wants_x = ctx.needs_input_grad[:2]
        return (d_y if wants_y else None, d_x if wants_x else None, None, None, None, None)
