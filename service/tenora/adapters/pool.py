"""Adapters on the device: one flat arena, true ranks, a slot per adapter, the least recently used ones making room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenora.adapters.free_list import FreeList
from tenora.adapters.peft_format import AdapterWeights
from tenora.adapters.safetensors_file import Array
from tenora.adapters.targets import TargetModule
from tenora.errors import AdapterFormatError, PoolFullError
from tenora_kernels.layout import LoraTables

_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load of any kernel


@dataclass(slots=True)
class _Resident:
    """An adapter on the device: its slot, its range of the arena, who uses it."""

    slot: int
    offset: int
    size: int
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    references: int = 0
    pinned: bool = False
    doomed: bool = False  # evicted while in use: goes with its last reference

    @property
    def evictable(self) -> bool:
        return self.references == 0 and not self.pinned


class SlotPool:
    """The adapters that `add_lora` can use. Not thread-safe: the step loop owns it, and calls it between steps.

    A slot number is valid while a reference is held, from `acquire` to `release`. Where a slot's weights lie may change
    with any `insert`; `tables` always tells. The arena is not written at the start; a large one costs nothing.

    Attributes:
        tables: what `add_lora` reads.
        evictions: adapters that had to go since the start, to make room or by `evict`.
    """

    def __init__(
        self,
        targets: Sequence[TargetModule],
        *,
        max_slots: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """An empty pool.

        Args:
            targets: the modules of the base; target i must have row i.
            max_slots: adapters that fit at most.
            max_bytes: size of the arena.
            dtype: of the weights on the device.
            device: where the base computes.
        """
        if [target.row for target in targets] != list(range(len(targets))):
            raise ValueError("the targets must be given in the order of their rows 0, 1, 2, …")
        self._targets = tuple(targets)
        self._itemsize = dtype.itemsize
        self._free = FreeList(max_bytes // dtype.itemsize, _ALIGNMENT_BYTES // dtype.itemsize)
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self.tables = LoraTables.empty(
            torch.empty(self._free.capacity, dtype=dtype, device=device),
            in_features=[target.in_features for target in targets],
            out_features=[target.out_features for target in targets],
            slots=max_slots,
        )
        self.evictions = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that adapters take."""
        return (self._free.capacity - self._free.free) * self._itemsize

    def resident(self) -> tuple[str, ...]:
        """Digests on the device, least recently used first."""
        return tuple(self._residents)

    def acquire(self, digest: str) -> int | None:
        """The slot of a resident adapter, with one more reference for `release` to give back; None if not resident."""
        resident = self._residents.get(digest)
        if resident is None:
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
        if resident.doomed and resident.evictable:
            self._remove(digest)

    def insert(self, digest: str, weights: AdapterWeights) -> int:
        """Copy an adapter to the device, without a reference: `acquire` it before the next insert.

        The least recently used adapters without a reference or pin make room; if their room is in pieces, the arena is
        compacted. If it cannot fit, nothing is evicted. Inserting a resident adapter changes nothing.

        Returns:
            Its slot.

        Raises:
            PoolFullError: too much is in use now; try again after a release.
            AdapterFormatError: it is larger than the whole pool, or holds values that the device's type cannot.
        """
        if (resident := self._residents.get(digest)) is not None:
            return resident.slot
        modules = [weights.modules.get(target.path) for target in self._targets]
        if sum(module is not None for module in modules) != len(weights.modules):
            raise AdapterFormatError("The adapter has modules that this base lacks; it is made for another base.")
        ranks = tuple(0 if module is None else module.rank for module in modules)
        scaling = tuple(0.0 if module is None else module.scaling for module in modules)
        size = self.tables.numel(ranks)
        self._make_room(size)
        tensors = [None if m is None else (self._device(m.a, m.dtype), self._device(m.bt, m.dtype)) for m in modules]
        offset = self._free.allocate(size)
        if offset is None:
            raise RuntimeError(f"no room for {size} elements although it was made; holes are {self._free.holes}.")
        slot = self._free_slots.pop()
        self.tables.place(slot, offset, ranks, scaling)
        for row, pair in enumerate(tensors):
            if pair is not None:
                self.tables.a(row, slot).copy_(pair[0])
                self.tables.bt(row, slot).copy_(pair[1])
        self._residents[digest] = _Resident(slot, offset, size, ranks, scaling)
        return slot

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
            resident.doomed = True
            return False
        self._remove(digest)
        return True

    def pin(self, digest: str) -> None:
        """Keep a resident adapter whatever needs room, and undo an `evict` that waits. ValueError if not resident."""
        resident = self._residents.get(digest)
        if resident is None:
            raise ValueError(f"adapter {digest} is not resident; insert it before pinning it.")
        resident.pinned, resident.doomed = True, False

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
            if r.references < 0 or (r.doomed and r.evictable):
                raise RuntimeError(f"adapter {digest} should be gone; it has {r.references} references.")
            self._check_tables(digest, r)
        for slot in self._free_slots:
            if self.tables.ranks[:, slot].any():
                raise RuntimeError(f"slot {slot} is free but has ranks.")

    def _check_tables(self, digest: str, resident: _Resident) -> None:
        if self.tables.ranks[:, resident.slot].tolist() != list(resident.ranks):
            raise RuntimeError(f"the ranks of adapter {digest} are not those of its slot {resident.slot}.")
        end = resident.offset
        for row, rank in enumerate(resident.ranks):
            if rank:
                a, b = int(self.tables.a_offset[row, resident.slot]), int(self.tables.b_offset[row, resident.slot])
                if (a, b) != (end, end + rank * self._targets[row].in_features):
                    raise RuntimeError(f"row {row} of adapter {digest} does not lie where it must.")
                end = b + rank * self._targets[row].out_features
        if end != resident.offset + resident.size:
            raise RuntimeError(f"adapter {digest} ends at {end}, not at {resident.offset + resident.size}.")

    def _make_room(self, size: int) -> None:
        """Evict, and compact if need be, until a slot and one hole of `size` are free; or raise and change nothing."""
        needed = self._free.rounded(size)
        if needed > self._free.capacity:
            raise AdapterFormatError(
                f"The adapter takes {size * self._itemsize} bytes, the whole pool has "
                f"{self._free.capacity * self._itemsize}; train a lower rank or enlarge adapter_pool_bytes."
            )
        evictable = [digest for digest, resident in self._residents.items() if resident.evictable]
        room = self._free.free + sum(self._free.rounded(self._residents[digest].size) for digest in evictable)
        if room < needed or not (self._free_slots or evictable):
            raise PoolFullError(
                f"All {len(self._residents)} adapters on the device are in use or pinned; try again shortly."
            )
        for digest in evictable:
            if self._free_slots and self._free.free >= needed:
                break
            self._remove(digest)
        if not any(stop - start >= needed for start, stop in self._free.holes):
            self._compact()

    def _compact(self) -> None:
        """Move every adapter towards the start, in order, so that one hole is left at the end."""
        self._free = FreeList(self._free.capacity, self._free.alignment)
        for resident in sorted(self._residents.values(), key=lambda resident: resident.offset):
            offset = self._free.allocate(resident.size)
            if offset is None:
                raise RuntimeError("the adapters on the device do not fit the arena that they come from.")
            if offset != resident.offset:
                # The ranges may overlap, so the values go through a copy.
                values = self.tables.arena[resident.offset : resident.offset + resident.size].clone()
                self.tables.arena[offset : offset + resident.size] = values
                resident.offset = offset
                self.tables.place(resident.slot, offset, resident.ranks, resident.scaling)

    def _remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        self.tables.clear(resident.slot)
        self._free.release(resident.offset, resident.size)
        self._free_slots.append(resident.slot)
        self.evictions += 1

    def _device(self, array: Array, dtype: str) -> Tensor:
        """An array of a file as a tensor of the arena's type, on its device."""
        values = torch.from_numpy(array)
        if dtype == "bfloat16":
            values = values.view(torch.bfloat16)
        result = values.to(device=self.tables.arena.device, dtype=self.tables.arena.dtype)
        if result.dtype == torch.float16 and not bool(result.isfinite().all()):
            raise AdapterFormatError("The adapter holds values beyond float16; serve the base in bfloat16 or float32.")
        return result
