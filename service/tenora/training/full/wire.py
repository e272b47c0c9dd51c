"""What the process of a full fine-tuning and whoever started it say to each other. Free of torch.

Both directions are pipes of frames: four bytes, big-endian, the length, and then a message in MessagePack.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tenora.training.events import FailedEvent, FinishedEvent, Recorded, RetoldEvent, StoppedEvent
from tenora.training.spec import TrainSpec

LENGTH_BYTES = 4
FullEvent = Recorded | RetoldEvent | FinishedEvent | StoppedEvent | FailedEvent
TERMINAL = FinishedEvent | StoppedEvent | FailedEvent


class Launch(msgspec.Struct, frozen=True, kw_only=True, tag="launch"):
    """What the process is to do; it reads no environment.

    Attributes:
        base: directory of the base.
        device: that it trains on.
        threads: of a CPU.
        log_level: of its log, on standard error.
    """

    spec: TrainSpec
    base: str
    device: str
    threads: int
    log_level: str


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """End; with `pause` so that it can go on."""

    pause: bool


class Acknowledge(msgspec.Struct, frozen=True, kw_only=True, tag="acknowledge"):
    """The first `count` of the run's `Recorded` events are recorded."""

    count: int


Message = Launch | Stop | Acknowledge
decode_message: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
decode_event: msgspec.msgpack.Decoder[FullEvent] = msgspec.msgpack.Decoder(FullEvent)


def frame(message: Any) -> bytes:
    """A message as it goes through a pipe."""
    content = msgspec.msgpack.encode(message)
    return len(content).to_bytes(LENGTH_BYTES, "big") + content
