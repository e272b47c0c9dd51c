"""Compiled kernels of earlier versions: removed when a service starts that does not need them."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tenora_kernels.cpu.runtime import cache

KEPT_SECONDS = 14 * 24 * 3600
"""Since a version was last started: who goes back to it meanwhile waits for no compiler."""
_OF_A_VERSION = re.compile(r"kernels-[0-9a-f]{16}")
_IN_USE = ".in-use"

_log = logging.getLogger(__name__)


@contextmanager
def kernels_in_use() -> Iterator[None]:
    """While the block runs no service of another version removes our kernels; at its beginning we remove old ones."""
    directory = cache.writable()
    if directory is None:
        yield
        return
    descriptor = os.open(directory / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(directory)
        prune(directory)
        yield
    finally:
        os.close(descriptor)


def prune(own: Path) -> None:
    """Remove the kernels beside `own` that are of other versions, long unused, and of no service that runs."""
    oldest = time.time() - KEPT_SECONDS
    for path in own.parent.iterdir():
        with suppress(OSError):  # gone meanwhile, or another user's
            if path != own and _OF_A_VERSION.fullmatch(path.name) and path.stat().st_mtime < oldest:
                _remove_unused(path)


def _remove_unused(directory: Path) -> None:
    descriptor = os.open(directory / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError, an OSError: a service uses them
        shutil.rmtree(directory)
        _log.info("kernels of an earlier version were removed", extra={"directory": str(directory)})
    finally:
        os.close(descriptor)
