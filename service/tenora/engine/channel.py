"""The engine process's end of the line: a ZeroMQ socket to the process that started it, and a door for others."""

from __future__ import annotations

import os
from pathlib import Path

import zmq

from tenora.engine.client.link import decode_command, encode
from tenora.engine.clients import OWNER
from tenora.engine.door import Door
from tenora.engine.messages import Event
from tenora.engine.protocols import Arrival

_LINGER_MS = 5000


class SocketChannel:
    """A PAIR socket for the owner's messages, a door, and a pipe that other threads use to end an idle wait."""

    def __init__(self, address: str, door: Path | None = None) -> None:
        """Connect to the owner at `address`, and let others in at `door`. Raises OSError if that cannot be had."""
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(address)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._door = None if door is None else Door(door, self._poller)

    def receive(self, timeout: float) -> list[Arrival]:
        """What has arrived; waits up to `timeout` seconds for the first arrival, or for `wake`."""
        ready = dict(self._poller.poll(int(timeout * 1000)))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        arrivals: list[Arrival] = []
        while True:
            try:
                arrivals.append((OWNER, decode_command(self._socket.recv(zmq.NOBLOCK))))
            except zmq.Again:
                break
        if self._door is not None and ready:
            arrivals += self._door.receive([one for one in ready if isinstance(one, int)])
        return arrivals

    def send(self, client: str, event: Event) -> None:
        """Queue an event; neither line has a high-water mark, so this never blocks."""
        if client == OWNER:
            self._socket.send(encode(event))
        elif self._door is not None:
            self._door.send(client, event)

    def waits(self) -> bool:
        """Whether a command has arrived that `receive` has not handed out."""
        return self._socket.poll(0, zmq.POLLIN) != 0 or (self._door is not None and self._door.waits())

    def wake(self) -> None:
        """End an idle wait; from any thread."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # thousands of wake-ups are pending, so one more adds nothing

    def close(self) -> None:
        """Flush what was sent and close."""
        if self._door is not None:
            self._door.close()
        self._socket.close()
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)
