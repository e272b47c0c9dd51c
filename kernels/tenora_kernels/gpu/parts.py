"""Scales of columns and bottlenecks on a GPU, for rows that are grouped on the device: forward, and never waiting.

The products of a bottleneck are the low-rank op's own kernels, shrink and expand; between them `activate` makes
f(S + b) of the planes. Gradients come from plain torch (`tenora_kernels.torch_parts`): passes that train know their
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenora_kernels.gpu import launch
from tenora_kernels.gpu.context import GpuBatch
from tenora_kernels.gpu.launch import Columns
from tenora_kernels.gpu.parts_kernels import activate, add_outer, choose_input, scale
from tenora_kernels.layout import BottleneckSite, LoraSite

_COLUMNS, _RANKS = 512, 64  # of a program


def scale_forward(y: Tensor, site: LoraSite, batch: GpuBatch, bias: Tensor | None) -> None:
    """Multiply y [T, out], unit column stride, in place; see `tenora_kernels.ops.scale_columns`."""
    if site.scale_row is None or not batch.segments.rows:
        return
    step = batch.step
    with launch.on(y):
        for part in launch.parts(site):
            columns = Columns.of(part.slices)
            scale[batch.segments.rows, columns.blocks(_COLUMNS)](
                y,
                y if bias is None else bias,
                step.arena,
                step.metadata.perm,
                step.metadata.sorted_slot,
                step.tables.ranks,
                step.tables.a_offset,
                step.tables.flags,
                site.scale_row + part.row - site.row,
                step.metadata.slots,
                y.stride(0),
                *columns.starts,
                *columns.widths,
                has_bias=bias is not None,
                bn=_COLUMNS,
                num_warps=4,
            )


def bottleneck_forward(y: Tensor, x: Tensor, site: BottleneckSite, batch: GpuBatch) -> None:
    """Add to y [T, H] in place; see `tenora_kernels.ops.add_bottleneck`. y and x have unit column strides."""
    rows = batch.segments.rows
    if not rows:
        return
    step, products = batch.step, LoraSite(site.row, site.features, ((0, site.features),))
    tables, metadata = step.tables, step.metadata
    blocks = -(-site.features // _COLUMNS)
    with launch.on(y):
        given = torch.empty_like(y, memory_format=torch.contiguous_format)
        choose_input[rows, blocks](
            given,
            y,
            x,
            metadata.perm,
            metadata.sorted_slot,
            tables.ranks,
            tables.flags,
            site.row,
            metadata.slots,
            y.stride(0),
            x.stride(0),
            site.features,
            bn=_COLUMNS,
            num_warps=4,
        )
        splits = launch.launch_shrink(given, products, step, backward=False)
        plane_stride, _, width = step.strides()
        activate[rows, -(-step.max_rank // _RANKS)](
            step.workspace.planes,
            step.arena,
            metadata.sorted_slot,
            tables.ranks,
            tables.a_offset,
            tables.flags,
            site.row,
            site.inner_row,
            metadata.slots,
            plane_stride,
            width,
            splits=splits,
            rb=_RANKS,
            num_warps=1,
        )
        launch.launch_expand(y, products, step, splits=1)
        add_outer[rows, blocks](
            y,
            step.arena,
            metadata.perm,
            metadata.sorted_slot,
            tables.ranks,
            tables.scaling,
            tables.a_offset,
            site.row,
            site.outer_row,
            metadata.slots,
            y.stride(0),
            site.features,
            bn=_COLUMNS,
            num_warps=4,
        )
