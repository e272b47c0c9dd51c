"""What names an adapter version: a digest of the bytes of its two files. Free of torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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
