"""The low-rank op on a CPU: one compiled call per site, whatever adapters its rows have.

Weights are read as they lie, float32 or bfloat16, at true ranks, once per block of rows; sums are float32. Rows without
an adapter cost nothing. A row's result depends on the row and its adapter alone, to the bit: neither the other rows of
the batch, nor their order, nor the number of threads change it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenora_kernels.cpu.lowrank import lora_backward, lora_blocks
from tenora_kernels.cpu.lowrank.lora_backward import input_job, weight_job
from tenora_kernels.cpu.lowrank.lora_blocks import RECORD_SIZE, forward_job, plan_forward
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.cpu.runtime.values import SAMPLES
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

__all__ = ["FORWARD_JOBS", "JOBS", "backward", "forward", "plan_forward", "supports", "warm_up"]

FORWARD_JOBS = (forward_job,)
JOBS = (forward_job, input_job, weight_job)
"""What the passes run, each with the arguments (control, address of the record, sample)."""


def supports(y: Tensor, x: Tensor, tables: LoraTables) -> bool:
    """Whether `forward` and `backward` take these tensors: float32 or bfloat16 rows and weights, on the CPU."""
    dtype = y.dtype
    return (
        dtype in SAMPLES
        and x.dtype == dtype
        and tables.arena.dtype in SAMPLES
        and y.device.type == "cpu"
        and y.stride(1) == 1
        and x.stride(1) == 1
    )


def forward(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> None:
    """Add the low-rank term to y in place, as `tenora_kernels.torch_backend.forward` does.

    Args:
        y: [T, out], float32 or bfloat16, with unit column stride.
        x: [T, in], of the same type, with unit column stride.
        site: whose modules adapt y.
        batch: tables and segments of this step; an arena of float32 or bfloat16.
    """
    record = _record(y, x, site, batch)
    address, sample, team = record.ctypes.data, SAMPLES[y.dtype], Team.shared(torch.get_num_threads())
    if plan_forward(address, team.size):
        team.run(forward_job, 0, address, sample)
    else:
        forward_job(0, address, sample)


def backward(dy: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, dx: Tensor | None) -> None:
    """Add the gradients of `forward` to dx and to `tables.grad`, as `tenora_kernels.torch_backend.backward` does.

    Args:
        dy: [T, out], float32 or bfloat16, with unit column stride.
        x: [T, in], of the same type, with unit column stride.
        site: whose modules adapt y.
        batch: tables and segments of the forward pass, unchanged since.
        dx: float32 [T, in] with unit column stride; None if nobody wants it.
    """
    tables, segments = batch.tables, batch.segments
    ranks = tables.arrays.ranks[site.row : site.row + len(site.slices), segments.arrays.seg_slot]
    if not ranks.any():
        return
    spans = ranks.max(axis=1).astype(np.int64)
    scratch = np.empty(2 * segments.adapted * int(spans.sum()), dtype=np.float32)
    identity = np.arange(int(spans.max()), dtype=np.int64)
    record = _record(dy, x, site, batch)
    record[lora_blocks.BLOCK] = lora_blocks.MAX_BLOCK
    if dx is not None:
        record[lora_backward.DX], record[lora_backward.DX_STRIDE] = dx.data_ptr(), dx.stride(0) * 4
    if tables.grad is not None:
        record[lora_backward.GRAD] = tables.grad.data_ptr()
    record[lora_backward.SCRATCH] = scratch.ctypes.data
    record[lora_backward.SPANS], record[lora_backward.IDENTITY] = spans.ctypes.data, identity.ctypes.data
    team = Team.shared(torch.get_num_threads())
    team.run(input_job, 0, record.ctypes.data, SAMPLES[x.dtype])
    if tables.grad is not None:
        record[lora_blocks.COUNTER] = 0
        team.run(weight_job, 0, record.ctypes.data, SAMPLES[x.dtype])


def warm_up(dtype: torch.dtype, *, train: bool = False) -> None:
    """Compile, or load from the cache on disk, what a model that computes in `dtype` will call.

    Args:
        dtype: float32 or bfloat16; nothing happens for another type.
        train: the gradients too.
    """
    if dtype not in SAMPLES:
        return
    arena = torch.zeros(4, dtype=dtype)
    grad = torch.zeros(4) if train else None
    tables = LoraTables.empty(arena, in_features=(2,), out_features=(2,), slots=1, grad=grad)
    tables.place(0, 0, [1], [1.0])
    site, batch = LoraSite(0, 2, ((0, 2),)), LoraBatch(tables, build_segments([0]))
    x = torch.zeros(1, 2, dtype=dtype)
    y = torch.zeros_like(x)
    forward(y, x, site, batch)
    if train:
        backward(x, x, site, batch, torch.zeros(1, 2))


def _record(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> NDArray[np.int64]:
    """What the compiled code reads; see the names in `lora_blocks`. 0 stands for what a call has not."""
    record = np.zeros(RECORD_SIZE, dtype=np.int64)
    arena, size = batch.tables.arena, x.dtype.itemsize
    record[lora_blocks.Y : lora_blocks.BLOCK] = (
        y.data_ptr(), y.stride(0) * size, x.data_ptr(), x.stride(0) * size,
        arena.data_ptr(), arena.dtype == torch.float32,
        site.record.address, batch.tables.record.address, batch.segments.record.address,
    )  # fmt: skip
    return record
