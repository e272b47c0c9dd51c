"""Fetching a base model in a process of its own: `python -m tenora.model.fetch NAME HOME`.

A download that is waited for in a thread cannot be ended; a process can. On SIGTERM, and when its parent ends, it stops
what it runs and removes what it has half written. Standard output carries JSON lines and nothing else: `{"stage":
"download", "done": 1, "total": 3}` again and again, then `{"directory": "…", "id": "…"}` or `{"error": "…"}`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tenora.errors import UnsupportedModelError
from tenora.model.catalog import resolve_model
from tenora.processes import die_with_parent


def main(name: str, home: Path) -> int:
    """Fetch and tell; the exit status."""
    die_with_parent(signal.SIGTERM)
    with interruptible():
        try:
            model = resolve_model(name, home, lambda stage, done, total: _say(stage=stage, done=done, total=total))
        except UnsupportedModelError as error:
            _say(error=error.message)
            return 1
    _say(directory=str(model.directory), id=model.id)
    return 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, by an exception: what it began is then undone."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], Path(sys.argv[2])))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
