"""Where adapters lie in memory, and which rows of a batch use which: the arguments of every low-rank op.

Storage is rank-major with true ranks. A module of rank r is two contiguous matrices in one flat arena, `A[r, in]`
and `Bᵀ[r, out]`, found through an offset table; nothing is padded to the largest rank. With this layout the backward
pass is shrink and expand again: dS = dY·B is a shrink with Bᵀ, dX = dS·A an expand with A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora_kernels.flags import EPILOGUE
from tenora_kernels.sites import BottleneckSite, HostRecord, LoraSite

__all__ = [
    "BASE",
    "BottleneckSite",
    "HostRecord",
    "LoraBatch",
    "LoraSegments",
    "LoraSite",
    "LoraTables",
    "SegmentArrays",
    "TableAddresses",
    "TableArrays",
    "accumulation_dtype",
    "build_segments",
]

BASE = -1
"""The slot of a row that uses no adapter."""


class TableArrays(NamedTuple):
    """The tables of `LoraTables` as numpy arrays over the same memory, for kernels that run on the host."""

    ranks: npt.NDArray[np.int32]
    scaling: npt.NDArray[np.float32]
    a_offset: npt.NDArray[np.int64]
    b_offset: npt.NDArray[np.int64]


_TABLE_DTYPES = {"ranks": torch.int32, "scaling": torch.float32, "a_offset": torch.int64, "b_offset": torch.int64}


class TableAddresses(NamedTuple):
    """Where the arrays of `LoraTables` lie, in bytes, and how many slots they have."""

    ranks: int
    scaling: int
    a_offset: int
    b_offset: int
    is_bf16: int
    slots: int
    flags: int


@dataclass(slots=True)
class LoraTables:
    """Where the weights of every slot lie. One row per target module of the model, one column per slot.

    Further rows may follow those of modules: bottlenecks, vectors that scale a projection's output, heads, ….

    Attributes:
        arena: 1-D storage of any float dtype, on the device of the model.
        ranks: int32 [rows, slots] on the CPU; 0 means that the slot does not adapt the module.
        scaling: float32 [rows, slots] on the CPU; the c in y += c · x·Aᵀ·Bᵀ.
        a_offset: int64 [rows, slots] on the CPU; first element of A[r, in], in elements of the slot's own type.
        b_offset: int64 [rows, slots] on the CPU; first element of Bᵀ[r, out], likewise.
        in_features: per row, columns of A.
        out_features: per row, columns of Bᵀ.
        grad: like the arena, but float32 (float64 for a float64 arena): `add_lora` adds dA and dBᵀ here. None when
            serving.
        low_rank_rows: how many rows, from the first, hold two matrices that are multiplied one after the other; the
            rank of the others is a number of labels or of virtual tokens. None: all.
        flags: int64 [slots]; what a slot is beside its ranks: SCALES, BOTTLENECKS, ….
        is_bf16: uint8 [slots]; 1 if the slot's matrices lie as bfloat16 in a float32 arena. Its offsets then count
            bfloat16 elements of the arena viewed as bfloat16. An adapter whose file is bfloat16 has the same values
            in half the bytes, and bytes are what a decode step is made of.
        version: grows with every `place` and `clear`, so that a mirror on a device knows when to copy. Whoever writes
            to the tables by hand adds one too.
        arrays: the four tables as numpy arrays over the same memory. Reading one element of them is many times faster
            than of a tensor, and a step reads a few per layer and segment.
        record: `TableAddresses` for kernels.
        addresses: the same by name.

    The tables may change between steps, never between a forward pass and its backward pass.
    """

    arena: Tensor
    ranks: Tensor
    scaling: Tensor
    a_offset: Tensor
    b_offset: Tensor
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]
    grad: Tensor | None = None
    low_rank_rows: int | None = None
    is_bf16: npt.NDArray[np.uint8] = field(init=False, repr=False)
    flags: npt.NDArray[np.int64] = field(init=False, repr=False)
    _highest: tuple[int, npt.NDArray[np.int32]] | None = field(init=False, repr=False, default=None)
    version: int = field(init=False, default=0)
    arrays: TableArrays = field(init=False, repr=False)
    record: HostRecord = field(init=False, repr=False)
    addresses: TableAddresses = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, dtype in _TABLE_DTYPES.items():
            table: Tensor = getattr(self, name)
            shape = (len(self.in_features), self.ranks.shape[-1])
            if table.dtype != dtype or tuple(table.shape) != shape or table.device.type != "cpu":
                raise ValueError(f"{name} must be {dtype} {shape} on the CPU, not {table.dtype} {tuple(table.shape)}.")
            if not table.is_contiguous():
                raise ValueError(f"{name} must be contiguous.")
        if len(self.out_features) != len(self.in_features):
            raise ValueError("in_features and out_features must both have one entry per row.")
        if self.arena.dim() != 1 or not self.arena.is_floating_point():
            raise ValueError("the arena must be a 1-D floating point tensor.")
        wanted = accumulation_dtype(self.arena.dtype)
        if self.grad is not None and (self.grad.shape != self.arena.shape or self.grad.dtype != wanted):
            raise ValueError(f"grad must have the arena's shape {tuple(self.arena.shape)}, in {wanted}.")
        self.is_bf16 = np.zeros(self.ranks.shape[1], dtype=np.uint8)
        self.flags = np.zeros(self.ranks.shape[1], dtype=np.int64)
        self.arrays = TableArrays(
            self.ranks.numpy(), self.scaling.numpy(), self.a_offset.numpy(), self.b_offset.numpy()
        )
        self.record = HostRecord.of(*self.arrays, self.is_bf16, self.ranks.shape[1], self.flags)
        self.addresses = TableAddresses(*self.record.values.tolist())

    @classmethod
    def empty(
        cls,
        arena: Tensor,
        *,
        in_features: Sequence[int],
        out_features: Sequence[int],
        slots: int,
        grad: Tensor | None = None,
        low_rank_rows: int | None = None,
    ) -> LoraTables:
        """Tables of `slots` slots that adapt nothing yet."""
        shape = (len(in_features), slots)
        return cls(
            arena=arena,
            **{name: torch.zeros(shape, dtype=dtype, device="cpu") for name, dtype in _TABLE_DTYPES.items()},
            in_features=tuple(in_features),
            out_features=tuple(out_features),
            grad=grad,
            low_rank_rows=low_rank_rows,
        )

    @property
    def highest_ranks(self) -> npt.NDArray[np.int32]:
        """[slots], the highest rank of any low-rank row in each slot; made anew when the tables have changed."""
        if self._highest is None or self._highest[0] != self.version:
            self._highest = (self.version, self.arrays.ranks[: self.low_rank_rows].max(axis=0, initial=0))
        return self._highest[1]

    def order(self, slots: Sequence[int]) -> npt.NDArray[np.int64]:
        """Places of the rows of a step in the order in which compiled steps want them.

        The base's first, then slot after slot; those whose slots have scales or bottlenecks last.

        Args:
            slots: of each row, -1 for one of the base.
        """
        found = np.asarray(slots, dtype=np.int64)
        has_epilogue = (found >= 0) & (self.flags[found] & EPILOGUE != 0)
        return np.lexsort((found, has_epilogue))

    @property
    def low_rank_widths(self) -> tuple[int, ...]:
        """Columns of the matrices of low-rank rows."""
        return (*self.in_features[: self.low_rank_rows], *self.out_features[: self.low_rank_rows])

    @property
    def rows(self) -> int:
        """Number of rows: target modules, and whatever else adapters have."""
        return len(self.in_features)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.ranks.shape[1]

    def rank(self, row: int, slot: int) -> int:
        """Rank of a module in a slot; 0 if the slot does not adapt it."""
        return int(self.arrays.ranks[row, slot])

    def scale(self, row: int, slot: int) -> float:
        """Scaling of a module in a slot."""
        return float(self.arrays.scaling[row, slot])

    def a(self, row: int, slot: int) -> Tensor:
        """View of A, [r, in], in the arena's dtype, or bfloat16 where `is_bf16`."""
        return self._matrix(self._weights(slot), self.arrays.a_offset, self.in_features, row, slot)

    def bt(self, row: int, slot: int) -> Tensor:
        """View of Bᵀ, [r, out], in the arena's dtype, or bfloat16 where `is_bf16`."""
        return self._matrix(self._weights(slot), self.arrays.b_offset, self.out_features, row, slot)

    def grad_a(self, row: int, slot: int) -> Tensor:
        """View of dA, [r, in]. ValueError if these tables serve."""
        return self._matrix(self._gradient(), self.arrays.a_offset, self.in_features, row, slot)

    def grad_bt(self, row: int, slot: int) -> Tensor:
        """View of dBᵀ, [r, out]. ValueError if these tables serve."""
        return self._matrix(self._gradient(), self.arrays.b_offset, self.out_features, row, slot)

    def numel(self, ranks: Sequence[int], *, is_bf16: bool = False) -> int:
        """Elements of the arena that an adapter takes.

        Args:
            ranks: one per row, 0 for a module that it skips.
            is_bf16: its matrices lie as bfloat16 in a float32 arena, two to an element, an odd last one rounded up.
        """
        values = sum(r * (i + o) for r, i, o in zip(ranks, self.in_features, self.out_features, strict=True))
        return (values + 1) // 2 if is_bf16 else values

    def place(
        self,
        slot: int,
        offset: int,
        ranks: Sequence[int],
        scaling: Sequence[float],
        *,
        is_bf16: bool = False,
        flags: int = 0,
    ) -> int:
        """Point `slot` at an adapter whose rows lie back to back from `offset`: A then Bᵀ, row by row.

        Args:
            slot: column to write.
            offset: first element in the arena, counted in the arena's own type for either type of slot.
            ranks: one per row; 0 for a module that the adapter skips.
            scaling: one per row; ignored where the rank is 0.
            is_bf16: the matrices lie as bfloat16.
            flags: see the attribute.

        Returns:
            The number of elements taken, `numel(ranks, is_bf16=is_bf16)`.

        Raises:
            ValueError: if a rank is negative, the adapter does not lie inside the arena, or bfloat16 matrices are asked
                for in an arena that is not float32 or has gradients. The slot is then unchanged.
        """
        rank = np.asarray(ranks, dtype=np.int64)
        size, capacity = self.numel(ranks, is_bf16=is_bf16), self.arena.numel()
        if is_bf16 and (self.arena.dtype != torch.float32 or self.grad is not None):
            raise ValueError("bfloat16 matrices need a float32 arena without gradients.")
        if rank.min(initial=0) < 0 or offset < 0 or offset + size > capacity:
            raise ValueError(f"{size} elements at {offset} do not fit an arena of {capacity} elements.")
        a_size, b_size = rank * np.asarray(self.in_features), rank * np.asarray(self.out_features)
        start = offset * (2 if is_bf16 else 1) + np.cumsum(a_size + b_size) - (a_size + b_size)
        tables = self.arrays
        tables.ranks[:, slot] = rank
        tables.scaling[:, slot] = np.where(rank > 0, np.asarray(scaling, dtype=np.float32), np.float32(0))
        tables.a_offset[:, slot] = np.where(rank > 0, start, 0)
        tables.b_offset[:, slot] = np.where(rank > 0, start + a_size, 0)
        self.is_bf16[slot] = is_bf16
        self.flags[slot] = flags
        self.version += 1
        return size

    def clear(self, slot: int) -> None:
        """Make `slot` adapt nothing. Its elements in the arena are left as they are."""
        for table in self.arrays:
            table[:, slot] = 0
        self.is_bf16[slot] = 0
        self.flags[slot] = 0
        self.version += 1

    def _weights(self, slot: int) -> Tensor:
        """The arena as the slot's matrices lie in it."""
        return self.arena.view(torch.bfloat16) if self.is_bf16[slot] else self.arena

    def _gradient(self) -> Tensor:
        if self.grad is None:
            raise ValueError("these tables serve and hold no gradients; build them with grad= to train.")
        return self.grad

    def _matrix(
        self, storage: Tensor, offsets: npt.NDArray[np.int64], columns: tuple[int, ...], row: int, slot: int
    ) -> Tensor:
        width = columns[row]
        start = storage.storage_offset() + int(offsets[row, slot])
        return storage.as_strided((int(self.arrays.ranks[row, slot]), width), (width, 1), start)


class SegmentArrays(NamedTuple):
    """perm, seg_ptr and seg_slot of `LoraSegments` as contiguous numpy arrays."""

    perm: npt.NDArray[np.int64]
    seg_ptr: npt.NDArray[np.int64]
    seg_slot: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LoraSegments:
    """Rows of a batch grouped by slot; built once per step and used by every layer.

    Attributes:
        perm: int64 [n], the rows that have an adapter, grouped by slot, ascending within a group. Base rows are absent.
        seg_ptr: [segments + 1]; segment i is `perm[seg_ptr[i]:seg_ptr[i + 1]]`.
        seg_slot: [segments]; the slot of each segment, each slot once: in the order of the rows if those of a slot lie
            together, else ascending.
        rows: T, the rows of the whole batch.
        first: the start of `perm` if it is a run first, first + 1, …, so that rows need no gathering; else None.
        arrays: perm, seg_ptr and seg_slot on the host, for kernels that run there.
        record: addresses of the three arrays, then the number of segments.
    """

    perm: Tensor
    seg_ptr: tuple[int, ...]
    seg_slot: tuple[int, ...]
    rows: int
    first: int | None
    arrays: SegmentArrays = field(repr=False, compare=False)
    record: HostRecord = field(repr=False, compare=False)

    @property
    def adapted(self) -> int:
        """n, the rows that have an adapter."""
        return self.seg_ptr[-1]


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """What the ops need to know about one step: the tables and the rows that use them.

    Attributes:
        flags: the bits that any slot of the segments has: what all of them lack nothing needs to be asked for.
    """

    tables: LoraTables
    segments: LoraSegments
    flags: int = field(init=False, default=0)
    on_device: ClassVar[bool] = False
    """Whether the host does not know the rows."""

    def __post_init__(self) -> None:
        slots = self.segments.arrays.seg_slot
        if slots.max(initial=BASE) >= self.tables.slots:
            raise ValueError(f"slot {slots.max()} is not one of the tables' {self.tables.slots} slots.")
        object.__setattr__(self, "flags", int(np.bitwise_or.reduce(self.tables.flags[slots])))


def build_segments(slot_of_row: Sequence[int] | Tensor, *, device: torch.device | None = None) -> LoraSegments:
    """Group the rows of a batch by slot.

    Args:
        slot_of_row: [T], the slot of each row, -1 for a row of the base. A tensor on a GPU costs one copy to the host.
        device: where `perm` shall lie; default is the device of `slot_of_row`, or the CPU for a sequence.

    Raises:
        ValueError: if a slot is below -1 or `slot_of_row` is not one-dimensional.
    """
    if isinstance(slot_of_row, Tensor):
        device = device or slot_of_row.device
        slots = slot_of_row.detach().cpu().numpy().astype(np.int64, copy=False)
    else:
        slots = np.asarray(slot_of_row, dtype=np.int64)
    if slots.ndim != 1 or slots.min(initial=BASE) < BASE:
        raise ValueError("slot_of_row must be one-dimensional, with -1 for rows of the base and slots from 0 on.")
    order = np.flatnonzero(slots >= 0)
    sorted_slots = slots[order]
    starts = np.flatnonzero(np.diff(sorted_slots, prepend=BASE))
    if len(starts) > 1 and len(np.unique(sorted_slots[starts])) < len(starts):  # rows of a slot lie apart
        order = order[np.argsort(sorted_slots, kind="stable")]
        sorted_slots = slots[order]
        starts = np.flatnonzero(np.diff(sorted_slots, prepend=BASE))
    n = len(order)
    is_run = n > 0 and bool((np.diff(order) == 1).all())
    arrays = SegmentArrays(order, np.append(starts, n), sorted_slots[starts])
    return LoraSegments(
        perm=torch.from_numpy(order).to(device or torch.device("cpu")),
        seg_ptr=tuple(arrays.seg_ptr.tolist()),
        seg_slot=tuple(arrays.seg_slot.tolist()),
        rows=len(slots),
        first=int(order[0]) if is_run else None,
        arrays=arrays,
        record=HostRecord.of(*arrays, len(starts)),
    )


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type in which low-rank products are summed: float64 if any operand is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
