"""Space on the registry's disk that only what frees space may use: a DELETE has to write before anything is freed."""

from __future__ import annotations

import os
from pathlib import Path

RESERVE_BYTES = 2**20  # a deletion changes some ten pages of 4 KiB, one of a thousand checkpoints some hundred


class Reserve:
    """A file that holds the space. Its methods touch the disk: call them in a thread.

    Attributes:
        whole: it has its full size, as far as this process knows.
    """

    def __init__(self, path: str) -> None:
        self.whole = False
        self._path = Path(path)

    def keep(self) -> None:
        """Take the space again, or as much as there is of it."""
        sizes = range(RESERVE_BYTES, 0, -RESERVE_BYTES // 16)
        self.whole = next((size for size in sizes if _allocate(self._path, size)), 0) == RESERVE_BYTES

    def lend(self) -> None:
        """Give the space back, if there is no other; `keep` takes it again."""
        if self._room():
            return
        self._path.unlink(missing_ok=True)
        self.whole = False

    def _room(self) -> bool:
        """Whether a deletion finds space without the reserve; found out by trying, because quotas show nowhere else."""
        trial = self._path.with_name(f"{self._path.name}-trial")
        try:
            return _allocate(trial, RESERVE_BYTES // 4)
        finally:
            trial.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> bool:
    """Make `path` a file of at least `size` bytes that lie on the disk; False, and nothing has changed, if they do not.

    Whatever the reason: a deletion must not fail for want of a reserve.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        before = os.fstat(descriptor).st_size
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.ftruncate(descriptor, before)
            return False
        return True
    finally:
        os.close(descriptor)
