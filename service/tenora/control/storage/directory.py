"""The state directory: where blobs lie, and the one way to write them (staging, fsync, rename).

    $TENORA_HOME/
        staging/                               half-written files; emptied at start
        tenants/<tenant_id>/files/<file_id>    one upload or result file each
        tenants/<tenant_id>/jobs/<job_id>/     work directory of an unfinished job
        adapters/                              `tenora.adapters.store.AdapterStore`

A path is built from ids that the server made, never from anything a client sent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tenora.adapters.atomic import fsync
from tenora.control.registry.ids import random_word
from tenora.control.storage.object_store import Entry, ObjectStore
from tenora.errors import ConfigurationError, StorageFullError


class Storage:
    """The files of the control plane under `root`.

    Attributes:
        objects: uploads and results; the rest is this machine's alone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.staging = root / "staging"
        self.adapters = root / "adapters"
        self._tenants = root / "tenants"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The root may have been made by something else, with other permissions: what is private is private by itself.
        for directory in (self.staging, self._tenants, self.adapters):
            directory.mkdir(mode=0o700, exist_ok=True)
        self.objects: ObjectStore = DirectoryStore(self._tenants, self.staging)

    def stage(self, suffix: str = "") -> Path:
        """A fresh path in staging; nothing exists there yet."""
        return _fresh(self.staging, suffix)

    def workdir(self, tenant_id: str, job_id: str) -> Path:
        """The work directory of a job."""
        return self._tenants / tenant_id / "jobs" / job_id

    def workdirs(self) -> Iterator[tuple[str, str, Path]]:
        """Every work directory as (tenant_id, job_id, path)."""
        for path in self._tenants.glob("*/jobs/*"):
            yield path.parts[-3], path.name, path

    def forget(self, tenant_id: str) -> None:
        """Remove everything of a tenant, and what its jobs work in."""
        self.objects.delete_all(tenant_id)
        remove(self._tenants / tenant_id)

    def sweep_staging(self, older_than: float) -> int:
        """Remove what a dead process left half-written before `older_than` (Unix time); how many entries."""
        removed = 0
        for path in self.staging.iterdir():
            if path.lstat().st_mtime < older_than:
                remove(path)
                removed += 1
        return removed


class DirectoryStore:
    """An `ObjectStore` on this machine, or on a file system that several share."""

    def __init__(self, root: Path, staging: Path) -> None:
        """Both lie on one file system."""
        self._root = root
        self._staging = staging

    def begin(self) -> _Staged:
        """See `ObjectStore`."""
        return _Staged(self, _fresh(self._staging))

    def local(self, tenant_id: str, object_id: str) -> str:
        """See `ObjectStore`."""
        return str(self.path(tenant_id, object_id))

    def delete(self, tenant_id: str, object_id: str) -> None:
        """See `ObjectStore`."""
        remove(self.path(tenant_id, object_id))

    def delete_all(self, tenant_id: str) -> None:
        """See `ObjectStore`."""
        remove(self._root / tenant_id / "files")

    def list(self) -> Iterator[Entry]:
        """See `ObjectStore`."""
        for path in self._root.glob("*/files/*"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                yield Entry(path.parts[-3], path.name, path.lstat().st_mtime)

    def path(self, tenant_id: str, object_id: str) -> Path:
        """Where an object lies, or would lie."""
        return self._root / tenant_id / "files" / object_id


class _Staged:
    """An `Incoming` in staging."""

    def __init__(self, store: DirectoryStore, staged: Path) -> None:
        self.size = 0
        self.local = str(staged)
        self._store = store
        self._staged = staged
        self._hash = hashlib.sha256()
        self._descriptor = -1

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, content: bytes) -> None:
        self._hash.update(content)
        self.size += len(content)
        view = memoryview(content)
        with full_disk():
            if self._descriptor < 0:
                self._descriptor = os.open(self._staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            while view:
                view = view[os.write(self._descriptor, view) :]

    def keep(self, tenant_id: str, object_id: str) -> None:
        self.write(b"")  # also of an empty one there is a file
        place(self._staged, self._store.path(tenant_id, object_id))

    def discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        remove(self._staged)


SERVICE_LOCK = "serve.lock"
WORKER_LOCK = "worker.lock"
_HOLDERS = {
    SERVICE_LOCK: "Another Tenora serves from {}; stop it, or set TENORA_HOME to another directory.",
    WORKER_LOCK: "Another worker works in {}; `tenora serve` starts one by itself.",
}


def claim(root: Path, name: str = SERVICE_LOCK) -> int:
    """Take a part in a state directory; the kernel frees it when this process ends, however that happens.

    Args:
        name: SERVICE_LOCK or WORKER_LOCK; each is held by one process at a time.

    Returns:
        A descriptor to be closed at the end.

    Raises:
        ConfigurationError: the directory cannot be had, or another process has that part in it.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"The state directory {root} cannot be written: {error.strerror or error}. Set TENORA_HOME to one that can."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigurationError(_HOLDERS[name].format(root)) from error
    return descriptor


def seat(root: Path, name: str = SERVICE_LOCK) -> str:
    """The name of a part in a state directory, for whoever has claimed it: of its holders one lives at a time."""
    lock = root / name
    if not (word := lock.read_text()):
        word = random_word(24)
        lock.write_text(word)
    return word


def vacant_seat(root: Path, name: str) -> str | None:
    """The name of a part that nobody holds, so that its last holder is known to be dead; None if it is held."""
    try:
        descriptor = claim(root, name)
    except ConfigurationError:
        return None
    try:
        return seat(root, name)
    finally:
        os.close(descriptor)


def _fresh(staging: Path, suffix: str = "") -> Path:
    return staging / f"{random_word(24)}{suffix}"


def place(staged: Path, final: Path) -> None:
    """Give a complete staged file its name: fsync, rename, fsync of the directory. Visible whole or not at all."""
    with full_disk():
        fsync(staged)
        if not final.parent.exists():
            final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # another of the tenant's files may come first
            fsync(final.parent.parent)
        staged.rename(final)
        fsync(final.parent)


def write_file(storage: Storage, final: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write `content` at `final` through staging, replacing what is there."""
    staged = storage.stage()
    try:
        with full_disk():
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
        place(staged, final)
    except BaseException:
        remove(staged)
        raise


def remove(path: Path) -> None:
    """Delete a file or a directory tree; nothing happens if it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into StorageFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageFullError("The disk is full; free some space and send the request again.") from error
        raise
