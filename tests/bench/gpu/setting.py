"""Tensors of one measurement: weights of several layers, so that none is found in the cache of the layer before."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.layout import LoraSite, LoraTables, build_segments
from tests.bench.gpu.peers import Grouped, Sgmv
from tests.bench.gpu.protocol import Measurement

COLD_BYTES = 256 << 20
"""Weights of all layers together, at least: several times a second-level cache."""


@dataclass
class Setting:
    """Everything of one measurement but the base weights and their results.

    Attributes:
        case: what is measured.
        sites: the group in each layer.
        x: [T, in].
        y: [T, out].
        tables: adapters of all layers.
        prepared: our device metadata.
        slot_of_row: int32 [T] on the device.
        sgmv: the peers' padded weights, per layer.
        grouped: those of `grouped_mm`, per layer.
    """

    case: Measurement
    sites: list[LoraSite]
    x: Tensor
    y: Tensor
    tables: LoraTables
    prepared: GpuLora
    slot_of_row: Tensor
    sgmv: list[Sgmv]
    grouped: list[Grouped]

    @classmethod
    def build(
        cls, case: Measurement, device: torch.device, *, layers: int | None = None, deviation: float = 0.02
    ) -> Setting:
        """Random weights, the same at every call.

        Args:
            case: what is measured.
            device: where.
            layers: how many; None: as many as make `COLD_BYTES`, at most 16.
            deviation: of the weights.
        """
        layers = layers or max(1, min(16, -(-COLD_BYTES // max(1, case.true_bytes()))))
        generator = torch.Generator(device=device).manual_seed(0)
        dtype, group, pool = torch.bfloat16, case.group, case.pool()
        bounds = [sum(group.outputs[:j]) for j in range(len(group.outputs) + 1)]
        slices = tuple(itertools.pairwise(bounds))
        modules = len(slices)
        ranks = [case.module_ranks(slot) * layers for slot in range(pool)]
        inputs, outputs = (group.inputs,) * (modules * layers), group.outputs * layers
        sizes = [sum(r * (i + o) for r, i, o in zip(row, inputs, outputs, strict=True)) for row in ranks]
        arena = torch.randn(sum(sizes), generator=generator, device=device, dtype=dtype).mul_(deviation)
        tables = LoraTables.empty(arena, in_features=inputs, out_features=outputs, slots=pool)
        for slot, row in enumerate(ranks):
            tables.place(slot, sum(sizes[:slot]), row, [1.0] * len(row))
        slots = case.slots()
        return cls(
            case=case,
            sites=[LoraSite(layer * modules, group.inputs, slices) for layer in range(layers)],
            x=torch.randn(case.rows, group.inputs, generator=generator, device=device, dtype=dtype),
            y=torch.randn(case.rows, bounds[-1], generator=generator, device=device, dtype=dtype),
            tables=tables,
            prepared=GpuLora(tables, max_rows=case.rows, max_rank=int(tables.ranks.max())),
            slot_of_row=torch.tensor(slots, dtype=torch.int32, device=device),
            sgmv=[_sgmv(tables, layer * modules, slices, slots) for layer in range(layers)],
            grouped=[_grouped(tables, layer * modules, slices, slots) for layer in range(layers)],
        )

    def sums(self) -> Tensor:
        """The buffer of the peers' partial sums."""
        modules, _, rank, _ = self.sgmv[0].a.shape
        return torch.empty(modules, self.case.rows, rank, dtype=torch.float32, device=self.x.device)


def _sgmv(tables: LoraTables, row: int, slices: tuple[tuple[int, int], ...], slots: list[int]) -> Sgmv:
    device, dtype, modules = tables.arena.device, tables.arena.dtype, len(slices)
    rank = int(tables.ranks.max())
    widest = max(stop - start for start, stop in slices)
    a = torch.zeros(modules, tables.slots, rank, tables.in_features[row], device=device, dtype=dtype)
    b = torch.zeros(modules, tables.slots, widest, rank, device=device, dtype=dtype)
    for j, (start, stop) in enumerate(slices):
        for slot in range(tables.slots):
            own = tables.rank(row + j, slot)
            a[j, slot, :own] = tables.a(row + j, slot)
            b[j, slot, : stop - start, :own] = tables.bt(row + j, slot).t() * tables.scale(row + j, slot)
    perm = build_segments(slots).perm.to(device=device, dtype=torch.int32)
    counts = torch.bincount(torch.tensor([slot for slot in slots if slot >= 0]), minlength=tables.slots)
    ends = counts.cumsum(0)
    return Sgmv(
        a=a,
        b=b,
        perm=perm,
        seg_ptr=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device=device, dtype=torch.int32),
        starts=torch.tensor([start for start, _ in slices], dtype=torch.int32, device=device),
        widths=torch.tensor([stop - start for start, stop in slices], dtype=torch.int32, device=device),
        longest=int(counts.max()),
    )


def _grouped(tables: LoraTables, row: int, slices: tuple[tuple[int, int], ...], slots: list[int]) -> Grouped:
    device, dtype, segments = tables.arena.device, tables.arena.dtype, build_segments(slots)
    used = segments.seg_slot
    a, b = [], []
    for j, (start, stop) in enumerate(slices):
        # grouped_mm wants strides of 16 bytes: ranks padded to 8.
        rank = -(-max(8, *(tables.rank(row + j, slot) for slot in used)) // 8) * 8
        down = torch.zeros(len(used), tables.in_features[row], rank, device=device, dtype=dtype)
        up = torch.zeros(len(used), rank, stop - start, device=device, dtype=dtype)
        for i, slot in enumerate(used):
            own = tables.rank(row + j, slot)
            down[i, :, :own] = tables.a(row + j, slot).t()
            up[i, :own] = tables.bt(row + j, slot) * tables.scale(row + j, slot)
        a.append(down)
        b.append(up)
    ends = torch.tensor(segments.seg_ptr[1:], dtype=torch.int32, device=device)
    return Grouped(a, b, segments.perm.to(device), ends, slices)
