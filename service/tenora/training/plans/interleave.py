"""Several coroutines of one run side by side."""

from __future__ import annotations

from collections.abc import Iterable

from tenora.training.events import Items


def interleave(parts: Iterable[Items]) -> Items:
    """Let each go on as far as it can, in turn, and yield None when all of them wait; ends when all have ended.

    Their works are then in the queue at the same time, and share passes.
    """
    going = list(parts)
    try:
        while going:
            for part in list(going):
                for item in part:
                    if item is None:
                        break
                    yield item
                else:
                    going.remove(part)
            if going:
                yield None
    finally:
        for part in going:
            part.close()
