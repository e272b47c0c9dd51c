"""What control keeps as files, and what it asks of the place where they lie.

Uploads, results and adapters are the service's state; whoever reads them (a tokenizer, Parquet, the engine, which maps
weights) needs them as local files. So a store is read as local files only: one on another machine fetches what is asked
for and keeps a copy. Work directories and what is half-written are of this machine (`directory.Storage`).

A method blocks: call it in a thread. An error for want of room is StorageFullError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tenora.adapters.ref import AdapterRef


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing; `written_at` is Unix time on the clock of whoever wrote it."""

    tenant_id: str
    object_id: str
    written_at: float


class Incoming(Protocol):
    """An object that is being written; nobody finds it before `keep`. One call at a time.

    Attributes:
        size: bytes so far.
        local: where what was written so far can be read, until `keep` or `discard`.
    """

    size: int
    local: str

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hex digits."""
        ...

    def write(self, content: bytes) -> None:
        """Append."""
        ...

    def keep(self, tenant_id: str, object_id: str) -> None:
        """Give it its name: it is there for good when this returns, and whole or not there if the process dies."""
        ...

    def discard(self) -> None:
        """Let go of it; what was kept stays."""
        ...


class ObjectStore(Protocol):
    """Files of tenants, by ids that the server made. They never change."""

    def begin(self) -> Incoming:
        """An object to be written. Nothing is done before the first write, so it need not be called in a thread."""
        ...

    def local(self, tenant_id: str, object_id: str) -> str:
        """Where its bytes lie as a local file until it is deleted, or would lie if it were there: opening it tells."""
        ...

    def delete(self, tenant_id: str, object_id: str) -> None:
        """Remove it; nothing happens if it is gone. Whoever has it open keeps reading it."""
        ...

    def delete_all(self, tenant_id: str) -> None:
        """Remove everything of a tenant."""
        ...

    def list(self) -> Iterator[Entry]:
        """All objects of all tenants."""
        ...


class VersionStore(Protocol):
    """Versions of adapters, by the digest of their content: PEFT directories, which never change."""

    def put(self, source: Path) -> str:
        """Store the PEFT directory, if it is not there already; its digest.

        Raises:
            AdapterFormatError: it lacks a file, or its configuration is not JSON.
        """
        ...

    def path(self, digest: str) -> Path:
        """Where the engine and others read a version as long as it is held or a row names it, or would read it."""
        ...

    def hold(self, digest: str) -> int:
        """A descriptor that keeps a version where it is, whichever process wants to delete it, until it is closed.

        Raises:
            NotFoundError: it is not stored, or is being deleted.
        """
        ...

    def alone(self, digest: str) -> AbstractContextManager[bool]:
        """Whether it is stored and no process holds it; if so, none begins to as long as the block runs."""
        ...

    def ref(self, digest: str) -> AdapterRef:
        """What the engine needs to load a version. NotFoundError if it is not stored."""
        ...

    def exists(self, digest: str) -> bool:
        """Whether a version is stored."""
        ...

    def delete(self, digest: str) -> bool:
        """Remove a version; False if there was none. Whoever has its files open keeps reading them."""
        ...

    def verify(self, digest: str) -> bool:
        """Whether it is stored and its bytes are the ones that its digest names."""
        ...

    def list(self) -> tuple[str, ...]:
        """The digests of all versions."""
        ...


@contextlib.contextmanager
def writing(store: ObjectStore) -> Iterator[Incoming]:
    """An object to be written, which is let go of at the end of the block if it was not kept."""
    incoming = store.begin()
    try:
        yield incoming
    finally:
        incoming.discard()


def put(store: ObjectStore, tenant_id: str, object_id: str, content: Iterable[bytes]) -> tuple[int, str]:
    """Store an object whole or not at all; its size and SHA-256."""
    with writing(store) as incoming:
        for chunk in content:
            incoming.write(chunk)
        incoming.keep(tenant_id, object_id)
        return incoming.size, incoming.sha256
