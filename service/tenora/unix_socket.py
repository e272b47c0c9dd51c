"""Unix sockets in a directory of any depth, and messages on them: a length of four bytes, then that many bytes."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MAX_MESSAGE", "Unpacker", "connect", "listen", "pack", "read_message"]

MAX_MESSAGE = 2**28
"""Bytes of the longest message: far above any that we send, so that a wrong length does not take all memory."""
_PREFIX = 4
_LONGEST_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS
_PRIVATE = 0o177  # the umask of a socket that only this user can connect to


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, in place of what a dead process left there. Raises OSError if it cannot be had."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as short:
            path.unlink(missing_ok=True)
            before = os.umask(_PRIVATE)
            try:
                listener.bind(short)
            finally:
                os.umask(before)
        listener.listen()
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path) -> socket.socket:
    """A connection to who listens at `path`. Raises OSError if nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as short:
            connection.connect(short)  # at once: the kernel needs nobody to accept
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of the same place that fits a socket's address: through a link that is gone after the block."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
        return
    directory = Path(tempfile.mkdtemp(prefix="tenora-", dir="/tmp"))
    link = directory / "to"
    try:
        link.symlink_to(path.parent.absolute(), target_is_directory=True)
        yield str(link / path.name)
    finally:
        link.unlink(missing_ok=True)
        directory.rmdir()


def pack(message: bytes) -> bytes:
    """A message as it goes over the socket."""
    return len(message).to_bytes(_PREFIX, "big") + message


class Unpacker:
    """Messages out of the pieces in which they arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        """Take a piece; the messages that are whole now. Raises ValueError for a message that is too long."""
        self._buffer += piece
        messages: list[bytes] = []
        while len(self._buffer) >= _PREFIX:
            end = _PREFIX + _checked(self._buffer[:_PREFIX])
            if len(self._buffer) < end:
                break
            messages.append(bytes(self._buffer[_PREFIX:end]))
            del self._buffer[:end]
        return messages


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None at the end of the connection, however it came. ValueError for one that is too long."""
    try:
        length = _checked(await reader.readexactly(_PREFIX))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        return None


def _checked(prefix: bytes | bytearray) -> int:
    length = int.from_bytes(prefix, "big")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes is announced, and {MAX_MESSAGE} are allowed")
    return length
