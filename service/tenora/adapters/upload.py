"""Adapters on their way to a GPU: copied by a thread and a stream of their own, past the steps that run meanwhile.

An adapter of an 8B base is 84 MB. It goes through a ring of pinned blocks that are allocated once: a GPU copies from
pinned memory by itself, and to pin memory anew for each adapter would stop it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

BLOCKS, BLOCK_BYTES = 4, 8 * 2**20


class Event(Protocol):
    """A place in what a stream was given to do."""

    def synchronize(self) -> None:
        """Wait, on the host, until the stream is there."""
        ...


class Streams(Protocol):
    """The two queues of a device that an upload concerns: one that computes, and one that copies."""

    def pinned(self, nbytes: int) -> Tensor:
        """Host memory uint8 [nbytes] that the device copies from by itself."""
        ...

    def computed(self) -> Event:
        """All that the computing stream was given so far."""
        ...

    def copies_after(self, event: Event) -> None:
        """What the copying stream is given from now on waits for `event`."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Copy pinned memory to the device, on the copying stream; the event is behind the copy."""
        ...

    def computes_after(self, event: Event) -> None:
        """What the computing stream is given from now on waits for `event`."""
        ...


class CudaStreams:
    """`Streams` of a GPU; the computing one is the default stream, on which the step loop works."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch

    def pinned(self, nbytes: int) -> Tensor:
        """See `Streams`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def computed(self) -> Event:
        """See `Streams`."""
        event: Event = self._compute.record_event()
        return event

    def copies_after(self, event: Event) -> None:
        """See `Streams`."""
        self._copies.wait_event(cast("torch.cuda.Event", event))

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """See `Streams`."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event: Event = self._copies.record_event()
        return event

    def computes_after(self, event: Event) -> None:
        """See `Streams`."""
        self._compute.wait_event(cast("torch.cuda.Event", event))


@dataclass(frozen=True, slots=True)
class Upload:
    """One adapter on its way."""

    copied: Future[Event]
    streams: Streams

    @property
    def done(self) -> bool:
        """Whether every copy was handed to the device (it may still be at it), or it failed."""
        return self.copied.done()

    def finish(self) -> None:
        """Have the computing stream wait for the copies; then the adapter may be used. Raises what went wrong.

        Waits on the host if the upload is not `done`.
        """
        self.streams.computes_after(self.copied.result())


class Uploader:
    """Copies adapters one after the other. `start` is for the step loop's thread alone."""

    def __init__(self, streams: Streams, wake: Callable[[], None] = lambda: None) -> None:
        """Take the ring's memory. `wake` is called from the thread when an upload is done."""
        self._streams, self._wake = streams, wake
        self._ring = [streams.pinned(BLOCK_BYTES) for _ in range(BLOCKS)]
        self._busy: list[Event | None] = [None] * BLOCKS  # what reads each block
        self._next = 0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-upload")

    def start(self, target: Tensor, values: Tensor) -> Upload:
        """Begin to copy `values` (uint8 [n], on the host) to `target` (uint8 [n], on the device).

        Whatever the computing stream was given before may still read what lies at `target`; the copies wait for it.
        Until `Upload.finish` nobody may use or move `target`.
        """
        copied = self._executor.submit(self._copy, target, values, self._streams.computed())
        copied.add_done_callback(lambda _: self._wake())
        return Upload(copied, self._streams)

    def close(self) -> None:
        """Start no more uploads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _copy(self, target: Tensor, values: Tensor, before: Event) -> Event:
        self._streams.copies_after(before)
        last = before
        for start in range(0, values.numel(), BLOCK_BYTES):
            piece = values[start : start + BLOCK_BYTES]
            if (reader := self._busy[self._next]) is not None:
                reader.synchronize()
            block = self._ring[self._next][: piece.numel()]
            block.copy_(piece)
            last = self._busy[self._next] = self._streams.copy(target[start : start + piece.numel()], block)
            self._next = (self._next + 1) % BLOCKS
        return last


def uploader_for(device: torch.device, wake: Callable[[], None]) -> Uploader | None:
    """That of a GPU; None for a CPU, where an adapter is copied before the call returns."""
    return Uploader(CudaStreams(device), wake) if device.type == "cuda" else None
