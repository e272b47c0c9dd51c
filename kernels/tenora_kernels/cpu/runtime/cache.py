"""Where compiled kernels lie on disk, and who compiles at the moment. Free of numba and torch.

Kernels are written to $NUMBA_CACHE_DIR if that is set, else beside their source, else into the user's cache; they are
read from beside their source in any case, so that an image whose root is read-only can bring them along. All of them
are compiled anew when one source file changes: the code of a function is in every function that calls it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Progress",
    "exclusive",
    "read_progress",
    "shipped",
    "source_digest",
    "under_way",
    "writable",
    "write_progress",
]

_HERE = Path(__file__).parents[1]  # all rooms of the CPU kernels
_RECORD_BYTES = 64


class Progress(NamedTuple):
    """Kernels that are done, how many there are, and how many of the done ones were in the cache."""

    done: int
    total: int
    found: int


@functools.cache
def source_digest() -> str:
    """Names the content of every source file of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(_HERE.rglob("*.py")):
        digest.update(str(path.relative_to(_HERE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def shipped() -> Path:
    """Beside the source, where kernels may have come with the code."""
    return _HERE / "__pycache__" / f"kernels-{source_digest()}"


@functools.cache
def writable() -> Path | None:
    """The directory into which kernels are written; None if there is none."""
    name = f"kernels-{source_digest()}"
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    own = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    places = [Path(chosen) / name] if chosen else [shipped(), Path(own).expanduser() / "tenora" / name]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK | os.X_OK):
            return place
    return None


@contextmanager
def exclusive() -> Iterator[None]:
    """One writer at a time: two of them would give two functions the same file."""
    directory = writable()
    if directory is None:
        yield
        return
    descriptor = os.open(directory / ".writing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def under_way() -> int | None:
    """Become the one that compiles; the descriptor's holders do until the last of them closes it, or ends.

    Returns:
        The descriptor, or None if somebody compiles already or nothing can be kept.
    """
    directory = writable()
    if directory is None:
        return None
    descriptor = os.open(directory / ".compiling", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    return descriptor


def complete(what: str) -> bool:
    """Whether everything of a name was compiled for this processor by an earlier process."""
    directory = writable()
    return directory is not None and (directory / f"complete-{_marker(what)}").exists()


def note_complete(what: str) -> None:
    """Everything of a name is in the cache now."""
    if (directory := writable()) is not None:
        (directory / f"complete-{_marker(what)}").touch()


def _marker(what: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join([what, platform.machine(), sys.version, *processor]).encode()).hexdigest()[:16]


def write_progress(descriptor: int, progress: Progress) -> None:
    """Tell others how far it is; `descriptor` comes from `under_way`."""
    os.pwrite(descriptor, json.dumps(progress).ljust(_RECORD_BYTES).encode(), 0)


def read_progress() -> Progress | None:
    """How far somebody else is who compiles now; None if nobody does."""
    directory = writable()
    if directory is None:
        return None
    try:
        descriptor = os.open(directory / ".compiling", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        record = os.pread(descriptor, _RECORD_BYTES, 0)
        return Progress(*json.loads(record)) if record else Progress(0, 0, 0)
    finally:
        os.close(descriptor)
    return None
