"""How a step learns which adapters its rows use: from tables on the host, or from their mirror on a device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tenora.model.executors.base import Batch, Integers
from tenora.model.to_device import to_device
from tenora_kernels.flags import EPILOGUE
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments

__all__ = ["AdapterRows", "Adapters", "DeviceAdapters", "HostAdapters"]


class Adapters(Protocol):
    """Finds the adapters of a step's rows."""

    def of(self, batch: Batch) -> LoraBatch | None:
        """Those of a step; None if all its rows are the base's."""
        ...


class HostAdapters:
    """Groups rows on the host. What was grouped is kept while only decoding goes on, with the same rows."""

    def __init__(self, tables: LoraTables, device: torch.device) -> None:
        self.tables = tables
        self._device = device
        self._kept: tuple[object, LoraBatch | None] = (None, None)  # what it was made for, and what it is

    def of(self, batch: Batch) -> LoraBatch | None:
        """See `Adapters`."""
        made_for = (batch.adapters.tolist(), self.tables.version) if batch.decodes else None
        if made_for is None or self._kept[0] != made_for:
            lora = None
            if batch.adapters.max(initial=-1) >= 0:
                segments = build_segments(torch.from_numpy(batch.adapter_of_token), device=self._device)
                lora = LoraBatch(self.tables, segments)
            self._kept = (made_for, lora)
        return self._kept[1]


class AdapterRows(Protocol):
    """Tells a step's rows which adapters are theirs; `tenora_kernels.gpu.context.GpuLora`.

    Attributes:
        bounds: ranks up to which a step can be prepared, ascending; lower ones take faster kernels.
    """

    bounds: tuple[int, ...]

    def refresh(self) -> bool:
        """Make what changed in the pool's tables visible to the device; between steps."""
        ...

    def bound(self, slots: Integers) -> int:
        """The lowest of `bounds` that fits the adapters of a step's rows [n]; 0 if none has one."""
        ...

    def flags(self, slots: Integers) -> int:
        """What adapters of a step's rows [n] have beside low-rank terms: bits of `tenora_kernels.flags.EPILOGUE`."""
        ...

    def batch(self, slot_of_row: Tensor, *, max_rank: int | None = None, flags: int = EPILOGUE) -> LoraBatch:
        """Group the rows of a step on the device, for ranks up to one of `bounds`; part of a captured graph."""
        ...


class DeviceAdapters:
    """Groups rows on the device: nothing waits for it."""

    def __init__(self, rows: AdapterRows, device: torch.device) -> None:
        self._rows, self._device = rows, device

    def of(self, batch: Batch) -> LoraBatch | None:
        """See `Adapters`."""
        max_rank = self._rows.bound(batch.adapters)
        if not max_rank:
            return None
        slots = to_device(torch.from_numpy(batch.adapter_of_token), self._device)
        return self._rows.batch(slots, max_rank=max_rank, flags=self._rows.flags(batch.adapters))
