"""Adapters on the device: one flat arena, true ranks, a slot per adapter, the least recently used ones making room."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tenora.adapters.arena_room import ALIGNMENT_BYTES, too_large
from tenora.adapters.free_list import FreeList
from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.table_rows import TableRows
from tenora.adapters.upload import Upload, Uploader
from tenora.errors import PoolFullError
from tenora_kernels import huge_pages
from tenora_kernels.layout import LoraTables

_MAX_MOVED_BYTES = 32 * 2**20  # moving this much takes about 10 ms, a third of a step


@dataclass(slots=True)
class _Resident:
    """An adapter on the device: its slot, its range of the arena, who uses it."""

    slot: int
    offset: int
    size: int
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    is_bf16: bool
    flags: int
    invocation: tuple[int, ...]
    references: int = 0
    pinned: bool = False
    pending_eviction: bool = False  # evicted while in use: goes with its last reference
    upload: Upload | None = None  # under way, and holding a reference; its slot adapts nothing until then

    @property
    def evictable(self) -> bool:
        return self.references == 0 and not self.pinned


class _Window(NamedTuple):
    """A part of the arena, [start, stop), from hole to hole, and how many elements of it adapters take."""

    start: int
    stop: int
    moved: int


class SlotPool:
    """The adapters that `add_lora` can use. Not thread-safe: the step loop owns it, and calls it between steps.

    A slot number is valid while a reference is held, from `acquire` to `release`. Where a slot's weights lie may change
    with any `insert`; `tables` always tells. The arena is not written at the start; a large one costs nothing.

    With an uploader an inserted adapter is resident at once, but cannot be acquired before it has arrived.

    Attributes:
        tables: what `add_lora` reads.
        evictions: adapters that had to go since the start, to make room or by `evict`.
        moved_bytes: what was moved inside the arena since the start because the free room was in pieces.
    """

    def __init__(
        self,
        rows: TableRows,
        *,
        max_slots: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        uploader: Uploader | None = None,
    ) -> None:
        """An empty pool.

        Args:
            rows: of the base.
            max_slots: adapters that fit at most.
            max_bytes: size of the arena.
            dtype: of the arena; on the CPU a bfloat16 adapter lies as such in an arena of float32.
            device: where the base computes.
            uploader: copies to the device beside what it computes; None: copies are part of `insert`.
        """
        self._rows = rows
        self._itemsize = dtype.itemsize
        self._free = FreeList(max_bytes // dtype.itemsize, ALIGNMENT_BYTES // dtype.itemsize)
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self.tables = LoraTables(
            arena=huge_pages.empty(self._free.capacity, dtype)
            if device.type == "cpu"
            else torch.empty(self._free.capacity, dtype=dtype, device=device),
            ranks=_zeros(len(rows), max_slots, np.int32),
            scaling=_zeros(len(rows), max_slots, np.float32),
            a_offset=_zeros(len(rows), max_slots, np.int64),
            b_offset=_zeros(len(rows), max_slots, np.int64),
            in_features=rows.in_features,
            out_features=rows.out_features,
            low_rank_rows=rows.low_rank,
        )
        self._bytes = self.tables.arena.view(torch.uint8).numpy() if device.type == "cpu" else None
        self._uploader = uploader
        self._arriving: set[str] = set()
        self._lost: dict[str, Exception] = {}  # what failed to arrive, until it is told
        self.evictions = 0
        self.moved_bytes = 0

    @property
    def max_bytes(self) -> int:
        """Size of the arena."""
        return self._free.capacity * self._itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that adapters take."""
        return (self._free.capacity - self._free.free) * self._itemsize

    def resident(self) -> tuple[str, ...]:
        """Digests on the device, least recently used first."""
        return tuple(self._residents)

    def holds(self, digest: str) -> bool:
        """Whether an adapter is on the device."""
        return digest in self._residents

    def invocation(self, digest: str) -> tuple[int, ...]:
        """The tokens from which on a resident adapter acts (`tenora.adapters.invocation`); empty: on all."""
        return self._residents[digest].invocation

    def acquire(self, digest: str) -> int | None:
        """The slot of a resident adapter, with one more reference for `release` to give back.

        None if it is not resident, or on its way: `holds` tells the two apart. Raises what its upload raised.
        """
        if (error := self._lost.pop(digest, None)) is not None:
            raise error
        resident = self._residents.get(digest)
        if resident is None or not self._has_arrived(digest, resident):
            return None
        resident.references += 1
        self._residents.move_to_end(digest)
        return resident.slot

    def release(self, digest: str) -> None:
        """Give a reference back. The adapter stays until its room is needed. ValueError if none is held."""
        resident = self._residents.get(digest)
        if resident is None or resident.references == 0:
            raise ValueError(f"no reference to adapter {digest} is held.")
        resident.references -= 1
        self._residents.move_to_end(digest)
        if resident.pending_eviction and resident.evictable:
            self._remove(digest)

    def insert(self, digest: str, adapter: PreparedAdapter) -> int:
        """Copy an adapter to the device, without a reference: `acquire` it before the next insert.

        The least recently used adapters without a reference or pin make room; if their room is in pieces, some are
        moved. If it cannot fit, nothing is evicted. Inserting a resident adapter changes nothing.

        Returns:
            Its slot.

        Raises:
            PoolFullError: too much is in use now; try again after a release.
            AdapterFormatError: it is larger than the whole pool.
            ValueError: it was prepared for another base or another type of the arena.
        """
        if (resident := self._residents.get(digest)) is not None:
            return resident.slot
        is_bf16 = adapter.values.dtype != self.tables.arena.dtype
        fits = len(adapter.ranks) == self.tables.rows and adapter.values.numel() == self.tables.numel(adapter.ranks)
        if not fits or (is_bf16 and (adapter.values.dtype, self._itemsize) != (torch.bfloat16, 4)):
            raise ValueError(f"the adapter was not prepared for this pool: {adapter.values.dtype}, {adapter.ranks}.")
        size = self.tables.numel(adapter.ranks, is_bf16=is_bf16)
        self._make_room(size)
        offset = self._free.allocate(size)
        if offset is None:
            raise RuntimeError(f"no room for {size} elements although it was made; holes are {self._free.holes}.")
        slot = self._free_slots.pop()
        facts = (adapter.ranks, adapter.scaling, is_bf16, adapter.flags, adapter.invocation)
        resident = _Resident(slot, offset, size, *facts)
        self._residents[digest] = resident
        if self._uploader is None or adapter.values.device.type != "cpu":
            self._write(offset, adapter.values)
            self._place(resident)
        else:
            start = offset * self._itemsize
            target = self.tables.arena.view(torch.uint8)[start : start + adapter.values.nbytes]
            resident.upload = self._uploader.start(target, adapter.values.view(torch.uint8))
            resident.references = 1
            self._arriving.add(digest)
        return slot

    def settle(self) -> None:
        """Take in what has arrived, also if nobody asks for it any more. Raises what a failed upload raised."""
        for digest in list(self._arriving):
            self._has_arrived(digest, self._residents[digest])
        if self._lost:
            raise self._lost.popitem()[1]

    @property
    def fills(self) -> bool:
        """Whether adapters are on their way and none is in use: if there is no room now, there will be."""
        in_use = any(resident.references for resident in self._residents.values() if resident.upload is None)
        return bool(self._arriving) and not in_use

    def close(self) -> None:
        """Start no more copies."""
        if self._uploader is not None:
            self._uploader.close()

    def evict(self, digest: str) -> bool:
        """Free an adapter's slot and room, pinned or not.

        Returns:
            True if it went. False if it was not resident or is in use: then it goes with its last reference.
        """
        resident = self._residents.get(digest)
        if resident is None:
            return False
        resident.pinned = False
        if resident.references:
            resident.pending_eviction = True
            return False
        self._remove(digest)
        return True

    def pin(self, digest: str) -> None:
        """Keep a resident adapter whatever needs room, and undo an `evict` that waits. ValueError if not resident."""
        resident = self._residents.get(digest)
        if resident is None:
            raise ValueError(f"adapter {digest} is not resident; insert it before pinning it.")
        resident.pinned, resident.pending_eviction = True, False

    def unpin(self, digest: str) -> None:
        """No longer keep an adapter; nothing happens if it is not resident or not pinned."""
        if (resident := self._residents.get(digest)) is not None:
            resident.pinned = False

    def check_integrity(self) -> None:
        """Prove that ranges, slots and tables fit together; RuntimeError says what does not. For tests and idling."""
        taken = [(r.offset, r.offset + self._free.rounded(r.size), digest) for digest, r in self._residents.items()]
        end = 0
        for start, stop, what in sorted(taken + [(start, stop, "a hole") for start, stop in self._free.holes]):
            if start != end:
                raise RuntimeError(f"{what} starts at {start}, but the range before it ends at {end}.")
            end = stop
        if end != self._free.capacity:
            raise RuntimeError(f"the ranges end at {end}, the arena at {self._free.capacity}.")
        slots = sorted([r.slot for r in self._residents.values()] + self._free_slots)
        if slots != list(range(self.tables.slots)):
            raise RuntimeError(f"the slots in use and the free ones are {slots}, not each slot once.")
        for digest, r in self._residents.items():
            if r.references < 0 or (r.pending_eviction and r.evictable):
                raise RuntimeError(f"adapter {digest} should be gone; it has {r.references} references.")
            if r.upload is None:
                self._check_tables(digest, r)
            elif self.tables.ranks[:, r.slot].any() or r.references != 1:
                raise RuntimeError(f"adapter {digest} is on its way, and its slot {r.slot} is in use already.")
        for slot in self._free_slots:
            if self.tables.ranks[:, slot].any() or self.tables.is_bf16[slot]:
                raise RuntimeError(f"slot {slot} is free but has ranks.")

    def _check_tables(self, digest: str, resident: _Resident) -> None:
        if self.tables.ranks[:, resident.slot].tolist() != list(resident.ranks):
            raise RuntimeError(f"the ranks of adapter {digest} are not those of its slot {resident.slot}.")
        if bool(self.tables.is_bf16[resident.slot]) != resident.is_bf16:
            raise RuntimeError(f"adapter {digest} and its slot {resident.slot} differ about the type of its weights.")
        end = resident.offset * (2 if resident.is_bf16 else 1)
        for row, rank in enumerate(resident.ranks):
            if rank:
                a, b = int(self.tables.a_offset[row, resident.slot]), int(self.tables.b_offset[row, resident.slot])
                if (a, b) != (end, end + rank * self.tables.in_features[row]):
                    raise RuntimeError(f"row {row} of adapter {digest} does not lie where it must.")
                end = b + rank * self.tables.out_features[row]
        last = resident.offset + resident.size
        if (end + 1 if resident.is_bf16 else end * 2) // 2 != last:
            raise RuntimeError(f"adapter {digest} ends at {end}, which is not where its range ends, at {last}.")

    def _make_room(self, size: int) -> None:
        """Evict, and compact if need be, until a slot and one hole of `size` are free; or raise and change nothing."""
        needed = self._free.rounded(size)
        if needed > self._free.capacity:
            raise too_large(size * self._itemsize, self._free.capacity * self._itemsize)
        evictable = [digest for digest, resident in self._residents.items() if resident.evictable]
        room = self._free.free + sum(self._free.rounded(self._residents[digest].size) for digest in evictable)
        if room < needed or not (self._free_slots or evictable):
            raise PoolFullError(
                f"All {len(self._residents)} adapters on the device are in use or pinned; try again shortly."
            )
        waiting = iter(evictable)
        while not self._free_slots or self._free.free < needed:
            self._remove(next(waiting))
        # A hole of the right size is what equal adapters leave behind. Otherwise some have to be moved, which holds up
        # the step: rather than move much, evict more.
        while (window := self._window(needed)) is not None and window.moved * self._itemsize > _MAX_MOVED_BYTES:
            victim = next(waiting, None)
            if victim is None:
                break
            self._remove(victim)
        if window is not None:
            self._close_up(window)

    def _window(self, needed: int) -> _Window | None:
        """The part of the arena where the least has to be moved for a hole of `needed` elements; None if one exists."""
        holes = self._free.holes
        if any(stop - start >= needed for start, stop in holes):
            return None
        best: _Window | None = None
        first, room = 0, 0
        for start, stop in holes:
            room += stop - start
            while room - (holes[first][1] - holes[first][0]) >= needed:
                room -= holes[first][1] - holes[first][0]
                first += 1
            moved = stop - holes[first][0] - room
            if room >= needed and (best is None or moved < best.moved):
                best = _Window(holes[first][0], stop, moved)
        if best is None:
            raise RuntimeError(f"no {needed} elements are free; holes are {holes}.")
        return best

    def _close_up(self, window: _Window) -> None:
        """Move the adapters of a window towards its start, in order, so that one hole is left at its end."""
        for digest in list(self._arriving):  # nothing is moved while it is written
            try:
                self._has_arrived(digest, self._residents[digest], wait=True)
            except Exception as error:  # noqa: BLE001  # told to who asks for that one: it is not who needs the room
                self._lost[digest] = error
        inside = [r for r in self._residents.values() if window.start <= r.offset < window.stop]
        inside.sort(key=lambda resident: resident.offset)
        for resident in inside:
            self._free.release(resident.offset, resident.size)
        end = window.start
        for resident in inside:
            self._free.take(end, resident.size)
            # The ranges may overlap, so the values go through a copy.
            values = self.tables.arena[resident.offset : resident.offset + resident.size].clone()
            self.tables.arena[end : end + resident.size] = values
            resident.offset = end
            self._place(resident)
            end += self._free.rounded(resident.size)
        self.moved_bytes += window.moved * self._itemsize

    def _has_arrived(self, digest: str, resident: _Resident, *, wait: bool = False) -> bool:
        """Whether an adapter can be used; it is published if its upload is done, and goes if that failed."""
        upload = resident.upload
        if upload is None:
            return True
        if not (upload.done or wait):
            return False
        resident.upload = None
        self._arriving.discard(digest)
        try:
            upload.finish()
        except Exception:
            self._remove(digest)
            raise
        self._place(resident)
        self.release(digest)
        return digest in self._residents  # an `evict` may have waited for this

    def _place(self, resident: _Resident) -> None:
        """Let the tables point at an adapter that lies in the arena."""
        self.tables.place(
            resident.slot,
            resident.offset,
            resident.ranks,
            resident.scaling,
            is_bf16=resident.is_bf16,
            flags=resident.flags,
        )

    def _write(self, offset: int, values: Tensor) -> None:
        """Copy prepared values to element `offset` of the arena; on a GPU in the order of what it computes."""
        start = offset * self._itemsize
        if self._bytes is not None:
            # One thread reaches the speed of the memory; torch would wake its pool for this.
            self._bytes[start : start + values.nbytes] = values.view(torch.uint8).numpy()
        else:
            arena = self.tables.arena.view(values.dtype)
            begin = start // values.itemsize
            arena[begin : begin + values.numel()].copy_(values, non_blocking=True)

    def _remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        self.tables.clear(resident.slot)
        self._free.release(resident.offset, resident.size)
        self._free_slots.append(resident.slot)
        self.evictions += 1


def _zeros(rows: int, slots: int, dtype: type[np.generic]) -> Tensor:
    """A table of zeros that is not written: numpy takes its zeros from the system, torch writes them."""
    return torch.from_numpy(np.zeros((rows, slots), dtype=dtype))
