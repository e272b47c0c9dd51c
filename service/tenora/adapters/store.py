"""Adapter versions on the local disk: immutable, named by their content, complete or absent. Free of torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tenora.adapters.atomic import fsync, new_directory, rename_into_place
from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME, chunks, content_hasher, digest_of
from tenora.adapters.peft_format import read_config
from tenora.adapters.ref import AdapterRef
from tenora.adapters.safetensors_file import parse_json_object
from tenora.errors import AdapterFormatError, NotFoundError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAGING = "staging"


class AdapterStore:
    """A directory of adapter versions, safe against crashes and against other processes that use it at the same time.

    Layout: `<root>/<first two hex digits>/<digest>/{adapter_config.json, adapter_model.safetensors}`, and
    `<root>/staging/…` for what is being written or deleted. Opening a store removes what a killed process left there.

    The store keeps what it is given: check files with `tenora.adapters.peft_format` before.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / _STAGING
        self._staging.mkdir(parents=True, exist_ok=True)
        self.collect_stale()

    def put(self, source: Path) -> str:
        """Store a PEFT directory and return its digest; equal content is stored once.

        Storing it again does nothing. The configuration is stored in a canonical form (see `canonical_config`), the
        weights byte for byte. A stored version whose bytes no longer match its digest is replaced.

        Raises:
            AdapterFormatError: if one of the two files is missing, or the configuration is not JSON.
            StorageFullError: if the disk is full; nothing was stored.
        """
        config = canonical_config(read_config(source))
        weights = source / WEIGHTS_NAME
        if not weights.is_file():
            raise AdapterFormatError(f"{WEIGHTS_NAME} is missing; give the directory that save_pretrained wrote.")
        with self._private_directory() as private:
            digest = self._stage(config, weights, private / "new")
            target = self.path(digest)
            if target.is_dir():
                if self.verify(digest):
                    return digest
                with contextlib.suppress(FileNotFoundError):  # deleted, or taken away by who repairs it too
                    target.rename(private / "damaged")
            target.parent.mkdir(exist_ok=True)
            fsync(self._root)
            with contextlib.suppress(FileExistsError):  # another process stored the same content meanwhile
                rename_into_place(private / "new", target)
        return digest

    def path(self, digest: str) -> Path:
        """Where a version lies, or would lie. ValueError if `digest` is not 64 lowercase hex digits."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a digest.")
        return self._root / digest[:2] / digest

    def exists(self, digest: str) -> bool:
        """Whether a version is stored."""
        return self.path(digest).is_dir()

    def ref(self, digest: str) -> AdapterRef:
        """What the engine needs to load a version. NotFoundError if it is not stored."""
        if not self.exists(digest):
            raise NotFoundError(f"No adapter version {digest} is stored here.")
        return AdapterRef(digest=digest, path=str(self.path(digest)))

    def list(self) -> tuple[str, ...]:
        """The digests of all versions, ascending."""
        found = (path.name for path in self._root.glob("[0-9a-f][0-9a-f]/*"))
        return tuple(sorted(name for name in found if _DIGEST.fullmatch(name)))

    def size(self, digest: str) -> int:
        """Bytes that a version takes. NotFoundError if it is not stored."""
        directory = Path(self.ref(digest).path)
        return sum((directory / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME))

    def verify(self, digest: str) -> bool:
        """Whether a version is stored and its bytes are the ones that its digest names. Reads all of them."""
        return digest_of(self.path(digest)) == digest

    def hold(self, digest: str) -> int:
        """A descriptor that keeps a version from being deleted by any process as long as it is open.

        Raises:
            NotFoundError: it is not stored, or is being deleted.
        """
        with contextlib.suppress(FileNotFoundError, BlockingIOError), contextlib.ExitStack() as stack:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Between the two calls above it may have been deleted, and even stored again.
            if os.path.samestat(os.fstat(descriptor), self.path(digest).stat()):
                stack.pop_all()
                return descriptor
        raise NotFoundError(f"No adapter version {digest} is stored here.")

    @contextlib.contextmanager
    def alone(self, digest: str) -> Iterator[bool]:
        """Whether a version is stored and no process holds it; if so, none begins to as long as the block runs."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(self.path(digest)))
            except (FileNotFoundError, BlockingIOError):
                yield False
            else:
                yield True

    def delete(self, digest: str) -> bool:
        """Remove a version; False if there was none. Whoever has its files open keeps reading them."""
        with self._private_directory() as private:
            try:
                self.path(digest).rename(private / "deleted")
            except FileNotFoundError:
                return False
            fsync(self.path(digest).parent)
        return True

    def collect_stale(self) -> int:
        """Remove what killed processes left in staging, and return how many such directories there were."""
        removed = 0
        for directory in self._staging.iterdir():
            with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked(directory):
                shutil.rmtree(directory)
                removed += 1
        return removed

    @contextlib.contextmanager
    def _private_directory(self) -> Iterator[Path]:
        """A directory in staging that lives as long as the block. Its lock tells other processes that it is in use."""
        while True:
            directory = Path(tempfile.mkdtemp(dir=self._staging))
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(_locked(directory))
                except (FileNotFoundError, BlockingIOError):
                    continue  # taken for stale by another process between its creation and its lock
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                yield directory
                return

    def _stage(self, config: bytes, weights: Path, directory: Path) -> str:
        """Write both files, flushed to disk, and return their digest."""
        hasher = content_hasher(config)
        with new_directory(directory) as temporary:
            (temporary / CONFIG_NAME).write_bytes(config)
            with weights.open("rb") as source, (temporary / WEIGHTS_NAME).open("wb") as copy:
                for chunk in chunks(source):
                    hasher.update(chunk)
                    copy.write(chunk)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                (temporary / name).chmod(0o444)
        return hasher.hexdigest()


def canonical_config(config: bytes) -> bytes:
    """adapter_config.json with its fields sorted, so that equal configurations are equal bytes.

    Only the top level is sorted: in `rank_pattern` and `alpha_pattern` the first match wins, so their order is content.
    """
    fields = parse_json_object(config, what=CONFIG_NAME)
    return (json.dumps(dict(sorted(fields.items())), indent=2) + "\n").encode()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, which the kernel frees if this process dies; BlockingIOError if it is held."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not directory.exists():  # removed between the two calls above
            raise FileNotFoundError(directory)
        yield
    finally:
        os.close(descriptor)
