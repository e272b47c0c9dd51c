"""The process of one full fine-tuning: `python -m tenora.training.full`, a child of the worker, ends with its run.

It reads a `Launch` from its standard input and then commands, and writes events to its standard output.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

import torch

from tenora.errors import TenoraError
from tenora.model.loading import load_decoder, resolve_device
from tenora.telemetry import logs
from tenora.training.events import FailedEvent, TrainEvent
from tenora.training.failures import explain
from tenora.training.full.selection import Selection
from tenora.training.full.training import FullHost, FullTraining
from tenora.training.full.wire import LENGTH_BYTES, Acknowledge, Launch, Message, Stop, decode_message, frame
from tenora.training.methods.table import find_method


def main() -> None:
    """Run until the run has said its last word."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no event
    source = os.fdopen(os.dup(0), "rb")
    launch = _read(source)
    if not isinstance(launch, Launch):
        sys.exit("no launch on standard input")
    logs.configure(launch.log_level)
    commands: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_listen, args=(source, commands), daemon=True).start()

    def tell(event: TrainEvent) -> None:
        events.write(frame(event))
        events.flush()

    try:
        _train(launch, commands, tell)
    except (TenoraError, OSError, MemoryError, RuntimeError) as error:
        code, message = explain(error, 0)
        tell(FailedEvent(run_id=launch.spec.run_id, code=code, message=message))


def _train(launch: Launch, commands: SimpleQueue[Message], tell: Callable[[TrainEvent], None]) -> None:
    torch.set_num_threads(launch.threads)
    spec, base = launch.spec, Path(launch.base)
    decoder = load_decoder(base, device=resolve_device(launch.device), dtype=torch.float32)
    settings = find_method(spec.method).own_settings(spec.method_settings)
    training = FullTraining(FullHost(decoder, Selection.of(settings, decoder.spec)), spec, base)
    for item in training:
        if item is not None:
            tell(item)
        while (command := _next(commands)) is not None:
            if isinstance(command, Stop):
                training.run.stop(pause=command.pause)
            elif isinstance(command, Acknowledge):
                training.run.acknowledge(command.count)


def _listen(source: BinaryIO, commands: SimpleQueue[Message]) -> None:
    """Take commands until nobody is there to give any: then what was done is worth saving."""
    while (message := _read(source)) is not None:
        commands.put(message)
    commands.put(Stop(pause=True))


def _read(source: BinaryIO) -> Message | None:
    length = source.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    content = source.read(int.from_bytes(length, "big"))
    return decode_message.decode(content)


def _next(commands: SimpleQueue[Message]) -> Message | None:
    try:
        return commands.get_nowait()
    except Empty:
        return None


if __name__ == "__main__":
    main()
