"""`add_lora`: the one low-rank op of serving and training, with its gradient. Backends are chosen here only."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenora_kernels import torch_backend
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, accumulation_dtype


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
