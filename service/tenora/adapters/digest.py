"""What names an adapter version: a digest of the bytes of its two files. Free of torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import BinaryIO

from tenora.errors import AdapterDamagedError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_CHUNK = 2**20


def content_hasher(config: bytes) -> hashlib._Hash:
    """The digest of a version so far: its configuration is in, the bytes of its weights are to follow."""
    hasher = hashlib.sha256(b"tenora adapter 1\n")
    hasher.update(len(config).to_bytes(8, "little"))
    hasher.update(config)
    return hasher


class HashingBeside:
    """A digest that is computed on another thread, in the order in which its bytes are given."""

    def __init__(self, hasher: hashlib._Hash, thread: Executor) -> None:
        """`hasher` is what has been hashed so far; `thread` has one worker, so that it keeps the order."""
        self._hasher = hasher
        self._thread = thread
        self._parts: list[Future[None]] = []

    def update(self, part: bytes | memoryview) -> None:
        """Hash these bytes too, soon; they must not change."""
        self._parts.append(self._thread.submit(self._hasher.update, part))

    def hexdigest(self) -> str:
        """The digest of all that was given, when it is there."""
        for part in self._parts:
            part.result()
        return self._hasher.hexdigest()


def digest_of(directory: Path) -> str | None:
    """The digest of the files as they lie there, all of which is read; None if one of them is missing."""
    try:
        with (directory / WEIGHTS_NAME).open("rb") as weights:
            hasher = content_hasher((directory / CONFIG_NAME).read_bytes())
            for chunk in chunks(weights):
                hasher.update(chunk)
    except FileNotFoundError:
        return None
    return hasher.hexdigest()


def damaged(digest: str) -> AdapterDamagedError:
    """The error of a version whose files are not those that its digest names."""
    return AdapterDamagedError(
        f"The stored files of the adapter version {digest[:12]} are damaged or gone, so it is not used. Import the "
        "same adapter again, or roll back to another version."
    )


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """A file's content in pieces of a megabyte."""
    while chunk := file.read(_CHUNK):
        yield chunk
