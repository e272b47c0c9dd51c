"""Where a step's device metadata comes from: prepared by the engine without a word to the host, or from a `LoraBatch`.

An engine makes one `GpuLora` per pool and stream, at start-up. Per step, and as the first thing that a CUDA graph
captures, `batch(slot_of_row)` groups the rows; `add_lora` takes the result like any other `LoraBatch`. Between steps,
never inside a graph, `refresh()` copies the tables of a pool that has changed. A graph replays with whatever
`slot_of_row` and the tables then hold: any mix, more adapters than at capture too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tenora_kernels.flags import EPILOGUE
from tenora_kernels.gpu import configs
from tenora_kernels.gpu.launch import Step
from tenora_kernels.gpu.tables import DeviceTables, StepMetadata, Workspace
from tenora_kernels.layout import BASE, LoraBatch, LoraSegments, LoraTables, build_segments

_NO_SEGMENTS = build_segments([])


@dataclass(frozen=True, slots=True)
class GpuBatch(LoraBatch):
    """A batch whose rows are grouped on the device only: its `segments` know their number of rows, nothing else.

    Valid until the `GpuLora` that made it makes the next one.
    """

    step: Step
    wanted: int = 0
    on_device: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """`flags` are `wanted`: what the caller says that its rows may have."""
        object.__setattr__(self, "flags", self.wanted)


class GpuLora:
    """The fixed buffers of one pool of adapters on one stream: everything that CUDA graphs may be captured over.

    Attributes:
        bounds: ranks up to which a step can be prepared, ascending; the last is the highest there may be. Ranks of the
            first take kernels that are faster than those for any rank.
    """

    def __init__(self, tables: LoraTables, *, max_rows: int, max_rank: int, align: int | None = None) -> None:
        """Allocate.

        Args:
            tables: the pool's tables; kept. Their arena must stay where it is.
            max_rows: most rows of a step.
            max_rank: highest rank that any adapter will have; decides block sizes and scratch memory.
            align: 16 if every adapter will start at a multiple of 16 elements, else 1; None: 16 if every width of the
                model is a multiple of 16.

        Raises:
            ValueError: if the pool holds an adapter already that does not fit these promises.
        """
        widths = tables.low_rank_widths
        if align is None:
            align = 1 if any(w % 16 for w in widths) or tables.arena.data_ptr() % 16 else 16
        device = tables.arena.device
        self.bounds = configs.rank_bounds(max_rank)
        self._tables = tables
        self._mirror = DeviceTables(tables, max_rank=max_rank, align=align)
        self._metadata = StepMetadata(max_rows, tables.slots, device)
        self._workspace = Workspace(max_rows, max_rank, max(widths), device)

    def refresh(self) -> bool:
        """Copy the pool's tables to the device if they changed since; asynchronous, and not to be captured.

        Returns:
            Whether they had changed.

        Raises:
            ValueError: if an adapter has a higher rank or another alignment than was promised.
        """
        return self._mirror.refresh(self._tables)

    def bound(self, slots: npt.NDArray[np.integer[Any]]) -> int:
        """The lowest of `bounds` for a step whose rows use `slots` [n], -1 for the base; 0 if none has an adapter.

        By the rows and not by the pool: a neighbour of high rank costs nobody who does not run beside it.
        """
        used = slots[slots >= 0]
        if not used.size:
            return 0
        highest = self._tables.highest_ranks[used].max()
        return next(bound for bound in self.bounds if highest <= bound)

    def flags(self, slots: npt.NDArray[np.integer[Any]]) -> int:
        """SCALES and BOTTLENECKS, as far as any row of a step has them, whose rows use `slots` [n], -1 for the base."""
        return int(np.bitwise_or.reduce(self._tables.flags[slots[slots >= 0]])) & EPILOGUE

    def batch(
        self,
        slot_of_row: Tensor,
        *,
        max_rank: int | None = None,
        max_segments: int | None = None,
        flags: int = EPILOGUE,
    ) -> GpuBatch:
        """Group the rows of a step on the device. Two launches, no synchronisation, may be captured.

        Args:
            slot_of_row: int32 or int64 [T] on the device; -1 for rows of the base and for padding. Not checked there.
            max_rank: from `bound`: no row's adapter has a higher one. None: any that the pool may hold.
            flags: from `flags`: what is not among them is not launched.
            max_segments: how many different adapters there are at most, if the caller knows: fewer idle programs.

        Raises:
            ValueError: if T exceeds `max_rows`.
        """
        self._metadata.build(slot_of_row, max_segments=max_segments)
        segments = dataclasses.replace(_NO_SEGMENTS, rows=slot_of_row.shape[0])
        step = Step(self._tables.arena, self._mirror, self._metadata, self._workspace, max_rank or self.bounds[-1])
        return GpuBatch(self._tables, segments, step, flags)


# Device copies of host structures, for as long as these live. The keys are the tensors that each owns alone; a value
# holds no reference to its key.
_mirrors: MutableMapping[Tensor, DeviceTables] = WeakTensorKeyDictionary()
_workspaces: MutableMapping[Tensor, Workspace] = WeakTensorKeyDictionary()
_steps: MutableMapping[Tensor, StepMetadata] = WeakTensorKeyDictionary()


def step_of(batch: LoraBatch) -> Step:
    """The device metadata of any batch; that of a plain `LoraBatch` is built at its first use and kept with it."""
    if isinstance(batch, GpuBatch):
        return batch.step
    tables, segments = batch.tables, batch.segments
    mirror = _mirrors.get(tables.ranks)
    if mirror is None:
        mirror = _mirrors[tables.ranks] = DeviceTables(tables)
    mirror.refresh(tables)
    metadata = _steps.get(segments.perm)
    if metadata is None or metadata.slots != tables.slots or metadata.perm.device != tables.arena.device:
        metadata = _steps[segments.perm] = _group(segments, tables)
    return Step(tables.arena, mirror, metadata, _workspace(tables, mirror.max_rank, segments.rows), mirror.max_rank)


def _group(segments: LoraSegments, tables: LoraTables) -> StepMetadata:
    slots = np.full(segments.rows, BASE, dtype=np.int32)
    slots[segments.arrays.perm] = np.repeat(segments.arrays.seg_slot, np.diff(segments.arrays.seg_ptr))
    device = tables.arena.device
    metadata = StepMetadata(segments.rows, tables.slots, device)
    metadata.build(torch.from_numpy(slots).to(device), max_segments=len(segments.seg_slot))
    return metadata


def _workspace(tables: LoraTables, max_rank: int, rows: int) -> Workspace:
    """Scratch memory that grows to the largest step so far."""
    workspace = _workspaces.get(tables.ranks)
    if workspace is None or workspace.max_rows < rows or workspace.width < max_rank:
        widest = max(tables.low_rank_widths)
        old_rows, old_width = (0, 0) if workspace is None else (workspace.max_rows, workspace.width)
        workspace = Workspace(max(rows, old_rows), max(max_rank, old_width), widest, tables.arena.device)
        _workspaces[tables.ranks] = workspace
    return workspace
