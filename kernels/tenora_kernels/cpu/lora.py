"""The low-rank op on a CPU: one compiled call per projection group, whatever adapters its rows have.

Weights are read as they lie, float32 or bfloat16, at true ranks, once per block of rows; sums are float32. Rows without
an adapter cost nothing. A row's result depends on the row and its adapter alone, to the bit: neither the other rows of
the batch, nor their order, nor the number of threads change it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from tenora_kernels.cpu.lora_backward import backward_call, input_tasks, weight_tasks
from tenora_kernels.cpu.lora_blocks import BF16, F32, forward_call, forward_tasks
from tenora_kernels.cpu.lora_threads import gomp_parallel
from tenora_kernels.cpu.values import SAMPLES
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

__all__ = ["backward", "forward", "supports", "warm_up"]


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
        site: the projection group.
        batch: tables and segments of this step; an arena of float32 or bfloat16.
    """
    size, jobs = _jobs(y.dtype)
    arena = batch.tables.arena
    forward_call(
        y.data_ptr(), y.stride(0) * size, x.data_ptr(), x.stride(0) * size,
        arena.data_ptr(), arena.dtype == torch.float32,
        site.record.address, batch.tables.record.address, batch.segments.record.address,
        _threads(), gomp_parallel(), jobs[0],
    )  # fmt: skip


def backward(dy: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, dx: Tensor | None) -> None:
    """Add the gradients of `forward` to dx and to `tables.grad`, as `tenora_kernels.torch_backend.backward` does.

    Args:
        dy: [T, out], float32 or bfloat16, with unit column stride.
        x: [T, in], of the same type, with unit column stride.
        site: the projection group.
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
    size, jobs = _jobs(x.dtype)
    arena, grad = tables.arena, tables.grad
    backward_call(
        dy.data_ptr(), dy.stride(0) * size, x.data_ptr(), x.stride(0) * size,
        0 if dx is None else dx.data_ptr(), 0 if dx is None else dx.stride(0) * 4,
        arena.data_ptr(), arena.dtype == torch.float32, 0 if grad is None else grad.data_ptr(),
        site.record.address, tables.record.address, segments.record.address,
        scratch.ctypes.data, spans.ctypes.data, identity.ctypes.data,
        _threads(), gomp_parallel(), jobs[1], jobs[2],
    )  # fmt: skip


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
    forward(torch.zeros_like(x), x, site, batch)
    if train:
        backward(x, x, site, batch, torch.zeros(1, 2))


def _threads() -> int:
    return torch.get_num_threads() if gomp_parallel() else 1


@functools.cache
def _jobs(dtype: torch.dtype) -> tuple[int, tuple[int, ...]]:
    """Bytes of an element, and the addresses of the code that each thread runs: forward and the backward phases."""
    jobs = _FLOAT32 if dtype == torch.float32 else _BFLOAT16
    return dtype.itemsize, tuple(_address(job) for job in jobs)


def _address(function: Callable[..., Any]) -> int:
    """Compile a job as a C function and keep it for the life of the process."""
    signature = types.void(types.intp)
    try:
        code = cfunc(signature, nopython=True, cache=True)(function)
    except RuntimeError:  # Numba knows of no directory that it may write to
        code = cfunc(signature, nopython=True)(function)
    _COMPILED.append(code)
    return int(code.address)


_COMPILED: list[Any] = []


def _forward_float32(record: int) -> None:
    forward_tasks(record, F32)


def _forward_bfloat16(record: int) -> None:
    forward_tasks(record, BF16)


def _inputs_float32(record: int) -> None:
    input_tasks(record, F32)


def _inputs_bfloat16(record: int) -> None:
    input_tasks(record, BF16)


def _weights_float32(record: int) -> None:
    weight_tasks(record, F32)


def _weights_bfloat16(record: int) -> None:
    weight_tasks(record, BF16)


_FLOAT32 = (_forward_float32, _inputs_float32, _weights_float32)
_BFLOAT16 = (_forward_bfloat16, _inputs_bfloat16, _weights_bfloat16)
