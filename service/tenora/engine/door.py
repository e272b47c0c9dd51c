"""Where processes other than the engine's owner come in: a Unix socket, and a connection for each."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from tenora.engine.client.link import decode_command, encode
from tenora.engine.messages import Event
from tenora.engine.protocols import Arrival, Joined, Left
from tenora.unix_socket import Unpacker, listen, pack

_log = logging.getLogger(__name__)

_PIECE = 2**16
MAX_BACKLOG = 2**26
"""Bytes that a client may leave unread before it is cut off: the engine never waits for a reader."""


@dataclass(slots=True)
class _Connection:
    """A client: its name, what has come of a message, and what could not be sent yet."""

    name: str
    socket: socket.socket
    incoming: Unpacker = field(default_factory=Unpacker)
    outgoing: bytearray = field(default_factory=bytearray)


class Door:
    """Clients that come and go. Every method runs on the thread of the step loop.

    A client is gone when its connection ends, which the kernel does however its process ends.
    """

    def __init__(self, path: Path, poller: zmq.Poller) -> None:
        """Listen at `path`; what is to be read or sent on wakes `poller`. Raises OSError if the place cannot be had."""
        self._poller = poller
        self._listener = listen(path)
        self._poller.register(self._listener.fileno(), zmq.POLLIN)
        self._connections: dict[int, _Connection] = {}
        self._names: dict[str, _Connection] = {}
        self._came = 0

    def receive(self, ready: Collection[int]) -> list[Arrival]:
        """What has come on the descriptors that are `ready`, and what can be sent now is sent."""
        arrivals: list[Arrival] = []
        for descriptor in ready:
            if descriptor == self._listener.fileno():
                arrivals += self._accept()
            elif (connection := self._connections.get(descriptor)) is not None:
                self._flush(connection)
                arrivals += self._read(connection)
        return arrivals

    def send(self, client: str, event: Event) -> None:
        """Queue an event for a client, if it is still there; never blocks."""
        if (connection := self._names.get(client)) is not None:
            connection.outgoing += pack(encode(event))
            self._flush(connection)

    def waits(self) -> bool:
        """Whether anything has come that `receive` has not handed out."""
        watched = [self._listener, *(connection.socket for connection in self._connections.values())]
        poller = zmq.Poller()
        for one in watched:
            poller.register(one.fileno(), zmq.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Send what can be sent, and let everybody go."""
        for connection in list(self._connections.values()):
            connection.socket.setblocking(True)
            connection.socket.settimeout(1.0)
            with suppress(OSError):
                connection.socket.sendall(connection.outgoing)
            self._drop(connection)
        self._poller.unregister(self._listener.fileno())
        self._listener.close()

    def _accept(self) -> list[Arrival]:
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return []
        accepted.setblocking(False)
        self._came += 1
        connection = _Connection(f"client-{self._came}", accepted)
        self._connections[accepted.fileno()] = self._names[connection.name] = connection
        self._poller.register(accepted.fileno(), zmq.POLLIN)
        return [(connection.name, Joined())]

    def _read(self, connection: _Connection) -> list[Arrival]:
        arrivals: list[Arrival] = []
        while True:
            try:
                piece = connection.socket.recv(_PIECE)
                arrivals += [(connection.name, decode_command(frame)) for frame in connection.incoming.feed(piece)]
            except BlockingIOError:
                return arrivals
            except ConnectionError:
                piece = b""
            except (msgspec.ValidationError, msgspec.DecodeError, ValueError) as error:
                _log.error("a client sent what cannot be read; it is cut off", extra={"reason": str(error)})
                piece = b""
            if not piece:
                self._drop(connection)
                arrivals.append((connection.name, Left()))
                return arrivals

    def _flush(self, connection: _Connection) -> None:
        if not connection.outgoing:
            return
        try:
            sent = connection.socket.send(connection.outgoing)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it is gone, which the next read tells
        del connection.outgoing[:sent]
        flags = zmq.POLLIN | zmq.POLLOUT if connection.outgoing else zmq.POLLIN
        if len(connection.outgoing) > MAX_BACKLOG:
            _log.error("a client does not read what it is told; it is cut off")
            with suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)  # the next read tells that it is gone
        self._poller.modify(connection.socket.fileno(), flags)

    def _drop(self, connection: _Connection) -> None:
        descriptor = connection.socket.fileno()
        self._poller.unregister(descriptor)
        del self._connections[descriptor], self._names[connection.name]
        connection.socket.close()
