"""The product with a frozen matrix that was packed once: y = x · Wᵀ in float32, W in float32 or bfloat16.

W is read once from memory per call and in the order of the addresses. bfloat16 weights stay bfloat16: they are widened
in registers, which costs two operations per 16 numbers. For decoding this halves the time (bytes decide), for many rows
it costs nothing (multiplications decide). The scheme of register blocks over packed panels is Goto and van de Geijn's,
"Anatomy of High-Performance Matrix Multiplication" (2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import float32
from torch import Tensor

from tenora_kernels import huge_pages
from tenora_kernels.cpu.products.product import (
    FEW_PANELS,
    MAX_ROWS,
    PANEL,
    bytes_of,
    multiply,
    multiply_few,
    packed_entry,
)
from tenora_kernels.cpu.runtime.compiled import compiled, job
from tenora_kernels.cpu.runtime.team import Team, claim, complete, join
from tenora_kernels.cpu.runtime.values import load, store
from tenora_kernels.cpu.runtime.vectors import LANES

__all__ = [
    "BF16_PANELS",
    "FLOAT32_PANELS",
    "PANEL",
    "PackedMatrix",
    "add_bias",
    "group_of",
    "matmul",
    "multiply_block",
    "multiply_rows",
    "row_blocks",
    "tile_count",
    "tile_of",
    "unpack",
]

ROW_BLOCK = 96
"""Rows that share one pass over the weights: their inputs (K = 576: 216 KiB) stay in the second-level cache."""

BF16_PANELS, FLOAT32_PANELS = np.uint32(0), np.float32(0)
"""Samples of the two element types; see `values`."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix W [N, K] in panels of PANEL output columns, each contiguous along K.

    Attributes:
        panels: int32 [⌈N / PANEL⌉, K, LANES] holding pairs of bfloat16, column j in the low and
            j + LANES in the high half, or float32 [⌈N / PANEL⌉, K, PANEL]. Columns beyond N are 0.
        out_features: N.
        in_features: K.
    """

    panels: Tensor
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor) -> PackedMatrix:
        """Pack a float32, float16 or bfloat16 matrix [N, K] on the CPU. bfloat16 stays so, the others are float32."""
        n, k = weight.shape
        count = -(-n // PANEL)
        is_bf16 = weight.dtype == torch.bfloat16
        source = weight.detach() if is_bf16 else weight.detach().float()
        if n % PANEL:
            source = torch.cat((source, source.new_zeros(count * PANEL - n, k)))
        if not is_bf16:
            panels = huge_pages.empty(count * k * PANEL, torch.float32).view(count, k, PANEL)
            return cls(panels.copy_(source.view(count, PANEL, k).transpose(1, 2)), n, k)
        # [count, 2, LANES, K] → [count, K, LANES, 2]: the two halves of an int32 lie next to each other, low one first.
        pairs = huge_pages.empty(count * k * PANEL, torch.int16).view(count, k, LANES, 2)
        pairs.copy_(source.view(torch.int16).view(count, 2, LANES, k).permute(0, 3, 2, 1))
        return cls(pairs.view(torch.int32).view(count, k, LANES), n, k)

    @property
    def is_bf16(self) -> bool:
        """Whether the weights are bfloat16."""
        return self.panels.dtype == torch.int32

    @property
    def padded(self) -> int:
        """N rounded up to whole panels: the columns that `multiply_block` writes."""
        return self.panels.shape[0] * PANEL

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` (int64 [T]) of W, float32 [T, K]: the lookup of an embedding that is also the head."""
        panel, column = index // PANEL, index % PANEL
        if not self.is_bf16:
            return self.panels[panel, :, column]
        halves = self.panels.view(torch.int16).view(-1, self.in_features, LANES, 2)
        chosen = halves[panel, :, column % LANES, column // LANES]
        return chosen.contiguous().view(torch.bfloat16).float()


@compiled()
def multiply_block(x, x_step, rows, w, first, last, panels, depth, out, out_step, add, sample):
    """out[0:rows, panels first … last - 1] (+)= x · Wᵀ. Addresses and steps in bytes; `w`: panel 0 of `panels`."""
    size = depth * PANEL * bytes_of(sample)
    panel = first
    if rows <= 3:
        many = FEW_PANELS[rows]
        while panel + many <= last:
            ahead = w + min(panel + many, panels - 1) * size
            multiply_few(
                rows, x, x_step, w + panel * size, depth, ahead, out + panel * PANEL * 4, out_step, add, sample
            )
            panel += many
    blocks = (rows + MAX_ROWS - 1) // MAX_ROWS
    while panel < last:
        here = w + panel * size
        # The next panel comes into the cache while the first rows are multiplied with this one.
        ahead = w + min(panel + 1, panels - 1) * size
        for block in range(blocks):
            start, stop = rows * block // blocks, rows * (block + 1) // blocks
            multiply(
                stop - start, x + start * x_step, x_step, here, depth, ahead if block == 0 else here,
                out + start * out_step + panel * PANEL * 4, out_step, add, sample,
            )  # fmt: skip
        panel += 1


@compiled()
def row_blocks(rows):
    """How many blocks of rows a product is cut into."""
    return (rows + ROW_BLOCK - 1) // ROW_BLOCK


@compiled()
def group_of(panels):
    """Panels in a task: enough tasks to share evenly, long enough to be worth the claim."""
    return min(16, max(4, panels // 48 * 4))


@compiled()
def tile_count(rows, panels, group):
    """How many tasks a product of so many rows and panels is, with `group` panels in each."""
    return row_blocks(rows) * ((panels + group - 1) // group)


@compiled()
def tile_of(task, rows, panels, group):
    """A task's rows start … stop - 1 and panels first … last - 1."""
    blocks, groups = row_blocks(rows), (panels + group - 1) // group
    block, first = task // groups, task % groups * group
    return rows * block // blocks, rows * (block + 1) // blocks, first, min(first + group, panels)


@compiled()
def add_bias(bias, first, last, rows, out, out_step):
    """out[0:rows, first:last] += bias[first:last]."""
    for row in range(rows):
        at = out + row * out_step
        for i in range(first, last):
            store(at, i, load(at, i, float32(0)) + load(bias, i, float32(0)), float32(0))


@compiled()
def multiply_rows(start, stop, fresh, x, x_step, w, first, last, panels, depth, out, out_step, sample):
    """Some panels of x · Wᵀ for the rows start … stop - 1; those from `fresh` on add to what is there.

    Args:
        x, x_step: address and step in bytes of float32 [T, depth].
        w: address of the first of `panels` packed panels; those from `first` to `last` - 1 are multiplied.
        out, out_step: of float32 [T, panels · PANEL].
        sample: BF16_PANELS or FLOAT32_PANELS.
    """
    middle = min(max(fresh, start), stop)
    for add in range(2):
        low, high = (start, middle) if add == 0 else (middle, stop)
        if low < high:
            multiply_block(
                x + low * x_step, x_step, high - low, w, first, last, panels, depth, out + low * out_step, out_step,
                add, sample,
            )  # fmt: skip


@job()
def _matmul_job(control, x, x_step, rows, w, panels, depth, out, out_step, sample):
    group = group_of(panels)
    tasks = tile_count(rows, panels, group)
    while True:
        task = claim(control, 0, tasks)
        if task < 0:
            break
        start, stop, first, last = tile_of(task, rows, panels, group)
        multiply_rows(start, stop, rows, x, x_step, w, first, last, panels, depth, out, out_step, sample)
        complete(control, 0)
    join(control, 0, tasks)


def matmul(x: Tensor, weight: PackedMatrix, team: Team) -> Tensor:
    """x · Wᵀ, float32 [T, N], on the members of a team.

    Args:
        x: float32 [T, K] with unit column stride.
        weight: W, packed.
        team: who computes.
    """
    rows = x.shape[0]
    out = torch.empty(rows, weight.padded)
    if rows:
        sample = BF16_PANELS if weight.is_bf16 else FLOAT32_PANELS
        x = x if x.stride(1) == 1 else x.contiguous()
        count = weight.panels.shape[0]
        team.run(
            _matmul_job, 1, x.data_ptr(), x.stride(0) * 4, rows, weight.panels.data_ptr(), count, weight.in_features,
            out.data_ptr(), weight.padded * 4, sample,
        )  # fmt: skip
    return out if weight.padded == weight.out_features else out[:, : weight.out_features]


@job()
def _unpack_job(control, w, panels, depth, columns, out, sample):
    while True:
        panel = claim(control, 0, panels)
        if panel < 0:
            break
        for column in range(min(PANEL, columns - panel * PANEL)):
            row = out + (panel * PANEL + column) * depth * 4
            for k in range(depth):
                store(row, k, packed_entry(w, panel * depth + k, column, sample), float32(0))
        complete(control, 0)
    join(control, 0, panels)


def unpack(weight: PackedMatrix, team: Team) -> Tensor:
    """W as it was, but float32 [N, K]."""
    out = torch.empty(weight.out_features, weight.in_features)
    team.run(
        _unpack_job, 1, weight.panels.data_ptr(), weight.panels.shape[0], weight.in_features, weight.out_features,
        out.data_ptr(), BF16_PANELS if weight.is_bf16 else FLOAT32_PANELS,
    )  # fmt: skip
    return out
