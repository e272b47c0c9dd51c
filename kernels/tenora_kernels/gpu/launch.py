"""Launches: from tensors and a site to the arguments and the grid of each kernel. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora_kernels.gpu import configs
from tenora_kernels.gpu.configs import MAX_MODULES, Tiles
from tenora_kernels.gpu.expand_kernels import expand, expand_joint
from tenora_kernels.gpu.shrink_kernel import shrink
from tenora_kernels.gpu.tables import DeviceTables, StepMetadata, TileTable, Workspace
from tenora_kernels.gpu.wgrad_kernel import lora_wgrad
from tenora_kernels.layout import LoraSite


@dataclass(frozen=True, slots=True)
class Step:
    """What every launch of a step reads.

    Attributes:
        arena: where the weights lie; on the device of all the others.
        tables: mirror of the pool's tables.
        metadata: the step's rows, grouped.
        workspace: scratch memory, one per stream.
        max_rank: highest rank of any adapter that rows of the step use; decides on the kernels.
    """

    arena: Tensor
    tables: DeviceTables
    metadata: StepMetadata
    workspace: Workspace
    max_rank: int

    @property
    def bucket(self) -> int:
        """Ranks of one pass."""
        return configs.rank_bucket(self.max_rank)

    @property
    def small(self) -> bool:
        """Whether decode tiles are used: by the number of rows."""
        return self.metadata.rows <= configs.DECODE_ROWS

    @property
    def tiles(self) -> TileTable:
        """The tile table for this step's number of rows."""
        return self.metadata.small if self.small else self.metadata.large

    def strides(self) -> tuple[int, int, int]:
        """Strides of the planes, as the kernels take them."""
        return self.workspace.strides(small=self.small)


@dataclass(frozen=True, slots=True)
class Columns:
    """Column slices of up to three modules as kernel arguments: start and width of each, 0 for those not there."""

    starts: tuple[int, int, int]
    widths: tuple[int, int, int]

    @classmethod
    def of(cls, slices: tuple[tuple[int, int], ...]) -> Columns:
        """From `[start, stop)` pairs."""
        padded = (*slices, *((0, 0),) * (MAX_MODULES - len(slices)))
        (a, b), (c, d), (e, f) = padded
        return cls((a, c, e), (b - a, d - c, f - e))

    def blocks(self, size: int) -> int:
        """Blocks of `size` columns, none spanning two modules."""
        return sum(-(-w // size) for w in self.widths)


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device; make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def parts(site: LoraSite) -> Iterator[LoraSite]:
    """The site in groups of at most `MAX_MODULES` modules."""
    if len(site.slices) <= MAX_MODULES:
        yield site
        return
    for j in range(0, len(site.slices), MAX_MODULES):
        yield LoraSite(site.row + j, site.in_features, site.slices[j : j + MAX_MODULES])


def launch_forward(y: Tensor, x: Tensor, site: LoraSite, step: Step) -> None:
    """Add the low-rank term of a site of at most three modules to y, in place.

    Args:
        y: [T, out], unit column stride.
        x: [T, in], unit column stride, not aliasing y.
        site: whose modules adapt y.
        step: tables, metadata and scratch memory.
    """
    splits = launch_shrink(x, site, step, backward=False)
    launch_expand(y, site, step, splits=splits)


def launch_shrink(source: Tensor, site: LoraSite, step: Step, *, backward: bool) -> int:
    """Fill the planes with S_j = x·A_jᵀ, or with dY_j·B_j (not yet scaled) if `backward`.

    Args:
        source: x [T, in], or dY [T, out]; unit column stride.
        site: whose modules adapt y.
        step: tables, metadata and scratch memory.
        backward: which.

    Returns:
        The number of planes.
    """
    columns = Columns.of(site.slices) if backward else Columns((0, 0, 0), (site.in_features,) * 3)
    widest = max(columns.widths)
    if widest > step.workspace.widest:
        raise ValueError(f"the planes of {widest} columns do not fit scratch memory for {step.workspace.widest}.")
    splits = configs.splits_of(widest, small=step.small)
    tiles, table, modules = _tiles(step, columns, source), step.tiles, len(site.slices)
    shrink[step.metadata.tile_bound(table), modules * splits](
        source,
        step.arena,
        step.workspace.planes,
        step.metadata.perm,
        table.ptr,
        table.slot,
        step.tables.ranks,
        step.tables.b_offset if backward else step.tables.a_offset,
        site.row,
        step.metadata.slots,
        source.stride(0),
        *columns.starts,
        *columns.widths,
        *step.strides(),
        splits=splits,
        bm=tiles.bm,
        rb=tiles.rb,
        bk=tiles.bk,
        single_row_rb=configs.SINGLE_ROW_RANKS,
        single_row_inputs=configs.single_row_inputs(configs.widest(source.dtype, step.arena.dtype))
        if step.small
        else 0,
        align=step.tables.align,
        cast=_cast(source, step.arena),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_overlap(source),
    )
    return splits


def launch_expand(y: Tensor, site: LoraSite, step: Step, *, splits: int) -> None:
    """Add what the planes hold to y through Bᵀ. The launch right behind `launch_shrink`, which lets it begin early.

    Args:
        y: [T, out]; unit column stride, changed in place.
        site: whose modules adapt y.
        step: tables, metadata and scratch memory.
        splits: number of planes.
    """
    columns, table, tables = Columns.of(site.slices), step.tiles, step.tables
    dtype = configs.widest(y.dtype, step.arena.dtype)
    bound = step.metadata.tile_bound(table)
    if step.small:
        tiles, parts, columns_per_program = _tiles(step, columns, y), 1, configs.single_row_columns(dtype, tables.align)
        per_program = columns_per_program // tiles.bn
        pieces = bound * configs.helpers(bound * columns.blocks(columns_per_program), per_program, y.device)
    else:
        tiles, columns_per_program = configs.expand_tiles(step.bucket, dtype, tables.align), 0
        parts = table.size // tiles.bm
        pieces = bound * parts
        per_program = configs.blocks_per_program(pieces * columns.blocks(tiles.bn), y.device)
    expand[columns.blocks(tiles.bn * per_program), pieces](
        y,
        step.arena,
        step.workspace.planes,
        step.metadata.perm,
        table.ptr,
        table.slot,
        step.metadata.small_count,
        tables.ranks,
        tables.scaling,
        tables.b_offset,
        site.row,
        step.metadata.slots,
        y.stride(0),
        *columns.starts,
        *columns.widths,
        *step.strides(),
        bound,
        per_program,
        multi_pass=step.max_rank > tiles.rb,
        parts=parts,
        splits=splits,
        bm=tiles.bm,
        rb=tiles.rb,
        bn=tiles.bn,
        single_row_rb=configs.SINGLE_ROW_RANKS,
        columns_per_program=columns_per_program,
        align=tables.align,
        terms=configs.term_count(step.arena.dtype, y.dtype),
        cast=configs.interpreted(y.device),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **_overlap(y),
    )


def launch_expand_joint(dx: Tensor, site: LoraSite, step: Step, *, splits: int) -> None:
    """Add what the planes hold, dS of every module, to dX through A.

    Args:
        dx: float32 [T, in]; unit column stride, changed in place.
        site: whose modules adapt y.
        step: tables, metadata and scratch memory.
        splits: number of planes.
    """
    columns, table, tables = Columns.of(((0, site.in_features),)), step.tiles, step.tables
    tiles = _tiles(step, columns, step.arena)
    expand_joint[columns.blocks(tiles.bn), step.metadata.tile_bound(table)](
        dx,
        step.arena,
        step.workspace.planes,
        step.metadata.perm,
        table.ptr,
        table.slot,
        tables.ranks,
        tables.scaling,
        tables.a_offset,
        site.row,
        step.metadata.slots,
        len(site.slices),
        dx.stride(0),
        site.in_features,
        *step.strides(),
        splits=splits,
        bm=tiles.bm,
        rb=tiles.rb,
        bn=tiles.bn,
        align=tables.align,
        terms=configs.term_count(step.arena.dtype, dx.dtype),
        cast=configs.interpreted(dx.device),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def launch_wgrad(grad: Tensor, dense: Tensor, site: LoraSite, step: Step, *, splits: int, of_b: bool) -> None:
    """Add scaling · Sᵀ·dense to the gradient of A (S, in the planes, is dS; dense is x) or Bᵀ (S is x·Aᵀ; dense is dY).

    Args:
        grad: float32, like the arena; changed in place.
        dense: x [T, in] or dY [T, out]; unit column stride.
        site: whose modules adapt y.
        step: tables, metadata and scratch memory.
        splits: number of planes.
        of_b: which.
    """
    modules = len(site.slices)
    columns = Columns.of(site.slices if of_b else ((0, site.in_features),) * modules)
    tiles = configs.wgrad_tiles(step.bucket, dense.dtype)
    lora_wgrad[columns.blocks(tiles.bn), step.metadata.segments](
        grad,
        dense,
        step.workspace.planes,
        step.metadata.perm,
        step.metadata.seg_ptr,
        step.metadata.seg_slot,
        step.tables.ranks,
        step.tables.scaling,
        step.tables.b_offset if of_b else step.tables.a_offset,
        site.row,
        step.metadata.slots,
        dense.stride(0),
        *columns.starts,
        *columns.widths,
        *step.strides(),
        splits=splits,
        bm=tiles.bm,
        rb=tiles.rb,
        bn=tiles.bn,
        align=step.tables.align,
        terms=configs.term_count(dense.dtype, torch.float32),
        cast=configs.interpreted(dense.device),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _tiles(step: Step, columns: Columns, source: Tensor) -> Tiles:
    dtype = configs.widest(source.dtype, step.arena.dtype)
    if step.small:
        return configs.decode_tiles(step.bucket, max(columns.widths), dtype, step.tables.align)
    return configs.prefill_tiles(step.bucket, dtype)


def _cast(source: Tensor, arena: Tensor) -> bool:
    """Whether `dot_low` must bring its operands to float32: they differ, or the interpreter runs."""
    return source.dtype != arena.dtype or configs.interpreted(source.device)


def _overlap(tensor: Tensor) -> dict[str, bool]:
    """Arguments of a launch that may begin while the one before it ends."""
    overlap = configs.overlaps(tensor.device)
    return {"overlap": overlap, **({"launch_pdl": True} if overlap else {})}
