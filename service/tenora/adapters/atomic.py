"""Files and directories that appear on disk complete or not at all. Free of torch."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenora.errors import StorageFullError


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target`, flushed to disk, when the block ends well; else it is removed.

    Args:
        target: must not exist, or be an empty directory; its parent must exist and holds the temporary directory.

    Raises:
        FileExistsError: if `target` came to hold something.
        StorageFullError: if the disk or the quota is full. Nothing is left behind.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:32]}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        for path in temporary.iterdir():
            fsync(path)
        rename_into_place(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError("The disk is full; free space and repeat the request.") from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def rename_into_place(source: Path, target: Path) -> None:
    """Give a finished directory its name, durably. FileExistsError if `target` holds something."""
    fsync(source)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(errno.EEXIST, "The directory exists and is not replaced", str(target)) from error
        raise
    fsync(target.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content, durably: a reader, or a process that was killed, finds the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
