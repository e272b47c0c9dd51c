"""Device mirrors: the tables of a pool, the metadata of a step, and the scratch memory of the kernels.

All of them are fixed buffers. A CUDA graph that was captured over them replays with any adapters and any mix of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenora_kernels.gpu import configs
from tenora_kernels.gpu.configs import LARGE_TILE, MAX_MODULES, SMALL_TILE
from tenora_kernels.gpu.metadata_kernels import find_tiles, sort_rows
from tenora_kernels.layout import LoraTables

_ALIGNED = 16
"""Elements; whole rows of A and Bᵀ can then be read 16 bytes at a time."""


class DeviceTables:
    """The four tables of a `LoraTables` on the device of its arena. Holds no reference to it.

    Attributes:
        ranks: int32 [rows, slots].
        scaling: float32 [rows, slots].
        a_offset: int64 [rows, slots].
        b_offset: int64 [rows, slots].
        flags: int64 [slots].
        align: every offset is a multiple of this number of elements, 16 or 1; a constant of the compiled kernels.
        max_rank: highest rank there is, or may be if it was given.
    """

    def __init__(self, tables: LoraTables, *, max_rank: int | None = None, align: int | None = None) -> None:
        """Mirror `tables`.

        Args:
            tables: what to mirror.
            max_rank: highest rank that any adapter will have. To be given before a CUDA graph is captured, because
                block sizes follow from it. None: the highest there is, at each refresh.
            align: 16 if every adapter will start at a multiple of 16 elements and every width is one; 1 if not. To be
                given before a CUDA graph is captured. None: as the tables are, at each refresh.
        """
        device = tables.arena.device
        self.ranks = torch.zeros_like(tables.ranks, device=device)
        self.scaling = torch.zeros_like(tables.scaling, device=device)
        self.a_offset = torch.zeros_like(tables.a_offset, device=device)
        self.b_offset = torch.zeros_like(tables.b_offset, device=device)
        self.flags = torch.zeros(tables.slots, dtype=torch.int64, device=device)
        self._wanted = (max_rank, align)
        self._version: int | None = None
        self.max_rank, self.align = max_rank or 1, align or 1
        self.refresh(tables)

    def refresh(self, tables: LoraTables) -> bool:
        """Copy the tables if they changed. Asynchronous: waits for no kernel.

        Returns:
            Whether they had changed.

        Raises:
            ValueError: if a slot holds what the mirror was told would not come: a higher rank, an offset that is not
                aligned, or bfloat16 matrices in a float32 arena. The mirror is then unchanged.
        """
        if tables.version == self._version:
            return False
        max_rank, align = int(tables.highest_ranks.max(initial=0)), _alignment(tables)
        if max_rank > (self._wanted[0] or max_rank):
            raise ValueError(f"an adapter has rank {max_rank}; these kernels were prepared for {self._wanted[0]}.")
        if align < (self._wanted[1] or align):
            raise ValueError(f"an adapter does not lie at a multiple of {_ALIGNED} elements, as these kernels expect.")
        if tables.is_bf16.any():
            raise ValueError("bfloat16 matrices in a float32 arena are for the CPU.")
        for name in ("ranks", "scaling", "a_offset", "b_offset", "flags"):
            source: Tensor = torch.as_tensor(getattr(tables, name))
            target: Tensor = getattr(self, name)
            if target.device.type == "cuda":
                # The allocator keeps a pinned block from being reused until its copy is done.
                target.copy_(source.pin_memory(), non_blocking=True)
            else:
                target.copy_(source)
        self.max_rank, self.align = max(1, self._wanted[0] or max_rank), self._wanted[1] or align
        self._version = tables.version
        return True


def _alignment(tables: LoraTables) -> int:
    """16 if every matrix begins at, and every row of one is, a multiple of 16 elements; else 1."""
    rows = slice(tables.low_rank_rows)
    bits = tables.arrays.a_offset[rows] | tables.arrays.b_offset[rows]
    whole = not (bits % _ALIGNED).any() and not any(w % _ALIGNED for w in tables.low_rank_widths)
    return _ALIGNED if whole and tables.arena.data_ptr() % 16 == 0 else 1


class TileTable:
    """Runs of at most `size` positions of perm that share a slot: run i is `perm[ptr[i]:ptr[i + 1]]`, in `slot[i]`."""

    def __init__(self, size: int, limit: int, device: torch.device) -> None:
        self.size = size
        self.ptr = torch.zeros(limit + 1, dtype=torch.int32, device=device)
        self.slot = torch.full((limit,), -1, dtype=torch.int32, device=device)

    def bound(self, rows: int, slots: int) -> int:
        """Most runs that `rows` rows in at most `slots` slots can make: each slot starts one, the rest fill them."""
        started = min(rows, slots)
        return started + (rows - started) // self.size


class StepMetadata:
    """Which rows of a step use which slot, grouped on the device. Built once per step, used by every layer.

    Attributes:
        perm: int32 [max_rows], the rows in order of slot; base rows last.
        sorted_slot: int32 [max_rows], the slot of each row of perm.
        seg_ptr: int32 [max_segments + 1]; segment i is `perm[seg_ptr[i]:seg_ptr[i + 1]]`. Segments have adapters.
        seg_slot: int32 [max_segments].
        nseg: int32 [1], their number.
        small_count: int32 [1], number of small tiles.
        small: tiles of adapted rows, for decode.
        large: tiles of all rows, for prefill; base rows are in slot -1.
        rows: rows of the step that was built last.
        segments: most segments that step can have.
    """

    def __init__(self, max_rows: int, slots: int, device: torch.device) -> None:
        self.slots = slots
        self.max_segments = max(1, min(max_rows, slots))
        self.perm = torch.zeros(max(1, max_rows), dtype=torch.int32, device=device)
        self.sorted_slot = torch.full_like(self.perm, -1)
        self._within = torch.zeros_like(self.perm)
        self.seg_ptr = torch.zeros(self.max_segments + 1, dtype=torch.int32, device=device)
        self.seg_slot = torch.full((self.max_segments,), -1, dtype=torch.int32, device=device)
        self.nseg = torch.zeros(1, dtype=torch.int32, device=device)
        self.small_count = torch.zeros(1, dtype=torch.int32, device=device)
        # Bounds grow with the rows, so that those of fewer rows fit too.
        self.small = TileTable(SMALL_TILE, max(1, max_rows), device)
        self.large = TileTable(LARGE_TILE, max(1, max_rows), device)
        self.max_rows, self.rows, self.segments = max_rows, 0, 0

    def build(self, slot_of_row: Tensor, *, max_segments: int | None = None) -> None:
        """Group the rows. Two launches, no synchronisation; may be captured, and replays with other slots.

        Args:
            slot_of_row: int32 or int64 [T] on the device, -1 for base rows and for padding. Every other entry must be
                a slot of the tables: nothing checks it on the device.
            max_segments: how many different adapters the rows have at most, if the caller knows; a tighter grid.

        Raises:
            ValueError: if there are more rows than `max_rows`.
        """
        rows = slot_of_row.shape[0]
        if rows > self.max_rows or slot_of_row.dim() != 1:
            raise ValueError(f"{tuple(slot_of_row.shape)} rows do not fit metadata for {self.max_rows} rows.")
        self.rows = rows
        self.segments = min(rows, self.max_segments if max_segments is None else max_segments)
        if rows == 0:
            return
        block = 64
        sort_rows[(-(-rows // block),)](slot_of_row, self.perm, self.sorted_slot, self._within, rows, block=block)
        find_tiles[(1,)](
            self.sorted_slot,
            self._within,
            self.seg_ptr,
            self.seg_slot,
            self.nseg,
            self.small_count,
            self.small.ptr,
            self.small.slot,
            self.large.ptr,
            self.large.slot,
            rows,
            self.segments,
            self.tile_bound(self.small),
            self.tile_bound(self.large),
            small=self.small.size,
            large=self.large.size,
            block=256 if rows <= 256 else 1024,
        )

    def tile_bound(self, table: TileTable) -> int:
        """Most tiles of `table` in this step: what a grid must cover."""
        return table.bound(self.rows, self.segments + (table is self.large))  # base rows are a run of their own


class Workspace:
    """Scratch memory of the kernels, used by one launch group after the other on one stream.

    Attributes:
        planes: float32, at least [splits, MAX_MODULES, rows, width] of either kind of tiles: partial sums of S.
        width: ranks of a plane's row.
    """

    def __init__(self, max_rows: int, max_rank: int, widest: int, device: torch.device) -> None:
        """Allocate for `max_rows` rows of up to `widest` inputs or outputs."""
        self.width = -(-max_rank // 16) * 16
        self.max_rows, self.widest = max(1, max_rows), widest
        size = max(configs.splits_of(widest, small=small) * self._rows(small=small) for small in (True, False))
        self.planes = torch.empty(size * MAX_MODULES * self.width, dtype=torch.float32, device=device)

    def strides(self, *, small: bool) -> tuple[int, int, int]:
        """Elements from one split's planes to the next, from one module's to the next, and from one row to the next."""
        module = self._rows(small=small) * self.width
        return MAX_MODULES * module, module, self.width

    def _rows(self, *, small: bool) -> int:
        return min(self.max_rows, configs.DECODE_ROWS) if small else self.max_rows
