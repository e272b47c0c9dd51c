"""The engine's process: loads the base, then serves the parent until told to stop or until the parent is gone."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import zmq

from tenora.config import Settings
from tenora.engine.client.link import decode_command, encode, start_failed
from tenora.engine.loop import run_loop
from tenora.engine.messages import Command, Event
from tenora.errors import DeviceLostError, TenoraError
from tenora.processes import die_with_parent
from tenora.telemetry.logs import configure

_log = logging.getLogger(__name__)
_LINGER_MS = 5000
DEVICE_LOST = 3
"""Exit status of an engine whose device failed for good."""


class SocketChannel:
    """The child's end of the line: a PAIR socket for messages and a pipe that other threads use to end an idle wait."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(address)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)

    def receive(self, timeout: float) -> list[Command]:
        """Commands that have arrived; waits up to `timeout` seconds for the first one, or for `wake`."""
        ready = dict(self._poller.poll(int(timeout * 1000)))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        commands: list[Command] = []
        while True:
            try:
                commands.append(decode_command(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return commands

    def send(self, event: Event) -> None:
        """Queue an event; the socket has no high-water mark, so this never blocks."""
        self._socket.send(encode(event))

    def waits(self) -> bool:
        """Whether a command has arrived that `receive` has not handed out."""
        return self._socket.poll(0, zmq.POLLIN) != 0

    def wake(self) -> None:
        """End an idle wait; from any thread."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # thousands of wake-ups are pending, so one more adds nothing

    def close(self) -> None:
        """Flush what was sent and close."""
        self._socket.close()
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)


def main() -> int:
    """Run the child; its launch message comes on standard input. Returns the exit status."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # the parent decides when it ends
    launch: dict[str, Any] = json.load(sys.stdin)
    parent = int(launch["parent"])
    die_with_parent()
    if os.getppid() != parent:
        return 1  # it died before the line above
    settings = Settings.model_validate(launch["settings"])
    configure(settings.log_level)
    channel = SocketChannel(launch["address"])
    try:
        status = serve(settings, Path(launch["model_dir"]), channel, parent)
    finally:
        channel.close()
    if status == DEVICE_LOST:
        logging.shutdown()
        os._exit(status)  # at an ordinary end a thread or a destructor could wait for the dead device
    return status


def serve(settings: Settings, model_dir: Path, channel: SocketChannel, parent: int) -> int:
    """Load, then loop. Returns the exit status."""
    try:
        # Here and not above: torch takes seconds to import, and signals must be ignored before.
        from tenora.engine.core import Engine  # noqa: PLC0415

        engine = Engine.load(settings, model_dir, wake=channel.wake, commands_wait=channel.waits, report=channel.send)
    except Exception as error:  # noqa: BLE001 — whatever it is, the parent is told
        if not isinstance(error, TenoraError):
            _log.exception("the engine could not start")
        channel.send(start_failed(error))
        return 1
    try:
        run_loop(engine, channel, orphaned=lambda: os.getppid() != parent)
    except DeviceLostError as error:
        _log.critical("the device failed for good; the engine ends to be replaced", extra={"reason": str(error)})
        return DEVICE_LOST
    return 0
