"""The low-rank op on a GPU: the functions of `tenora_kernels.torch_backend`.

Runs bf16, fp16 and float32, in any mix of the three; float64 is left to plain torch. Nothing waits for the device
when the batch is a `GpuBatch`; a plain `LoraBatch` costs one copy of its tables to the device at its first use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenora_kernels import torch_backend
from tenora_kernels.gpu import launch
from tenora_kernels.gpu.context import GpuBatch, step_of
from tenora_kernels.gpu.launch import Step
from tenora_kernels.layout import LoraBatch, LoraSite

DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
"""Types of y, x and the arena that the kernels take."""


def forward(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> None:
    """Add the low-rank term to y in place: `y[t, slice] += c · (x[t]·Aᵀ)·Bᵀ` for every row that has an adapter.

    Sums are float32; y is rounded once, at the end. Rows of the base and columns of modules that a row's adapter skips
    are not written. Equal arguments give equal bits. In batches of up to `configs.DECODE_ROWS` rows a row that is alone
    with its adapter has the same bits in all of them, and so has one that is not.

    Args:
        y: [T, out].
        x: [T, in], not aliasing y.
        site: whose modules adapt y.
        batch: tables and rows of this step.

    Raises:
        TypeError: for float64 operands with a `GpuBatch`.
    """
    if _empty(batch):
        return
    if not _runs(batch, y, x):
        torch_backend.forward(y, x, site, batch)
        return
    with launch.on(y):
        step, x = step_of(batch), _unit_stride(x)
        out = _unit_stride(y)
        for part in launch.parts(site):
            launch.launch_forward(out, x, part, step)
        if out is not y:
            y.copy_(out)


def backward(dy: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, dx: Tensor | None) -> None:
    """Add the gradients of `forward` to dx and, if the tables train, to `tables.grad`.

    With S = x·Aᵀ and dS = c·dY·B: dX += dS·A, dA += dSᵀ·X, dBᵀ += c·Sᵀ·dY. S is computed again rather than kept.

    Args:
        dy: [T, out], the gradient of y.
        x: [T, in], the input of the forward pass.
        site: whose modules adapt y.
        batch: tables and rows of the forward pass, unchanged since.
        dx: float32 [T, in], contiguous; only adapted rows are written. None if nobody wants it.

    Raises:
        TypeError: for float64 operands with a `GpuBatch`.
    """
    if _empty(batch):
        return
    if not _runs(batch, dy, x):
        torch_backend.backward(dy, x, site, batch, dx)
        return
    with launch.on(dy):
        step, x, dy = step_of(batch), _unit_stride(x), _unit_stride(dy)
        for part in launch.parts(site):
            _backward(dy, x, part, step, dx, batch.tables.grad)


def _backward(dy: Tensor, x: Tensor, site: LoraSite, step: Step, dx: Tensor | None, grad: Tensor | None) -> None:
    splits = launch.launch_shrink(dy, site, step, backward=True)
    if dx is not None:
        launch.launch_expand_joint(dx, site, step, splits=splits)
    if grad is not None:
        launch.launch_wgrad(grad, x, site, step, splits=splits, of_b=False)
        splits = launch.launch_shrink(x, site, step, backward=False)
        launch.launch_wgrad(grad, dy, site, step, splits=splits, of_b=True)


def _empty(batch: LoraBatch) -> bool:
    """No rows, or the host knows that none has an adapter."""
    return batch.segments.rows == 0 or not (isinstance(batch, GpuBatch) or batch.segments.seg_slot)


def _runs(batch: LoraBatch, y: Tensor, x: Tensor) -> bool:
    if {y.dtype, x.dtype, batch.tables.arena.dtype} <= DTYPES:
        return True
    if isinstance(batch, GpuBatch):
        raise TypeError(f"no GPU kernel for {y.dtype}, {x.dtype} and {batch.tables.arena.dtype}.")
    return False


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
