"""CPU time of this thread: what a busy machine takes away does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Prepare = Callable[[], object]


def median(run: Callable[[], object], repeats: int, prepare: Prepare = lambda: None) -> float:
    """Seconds of the middle one of `repeats` runs, two more before them; `prepare` runs before each, unmeasured."""
    taken: list[float] = []
    for index in range(repeats + 2):
        prepare()
        begun = time.thread_time()
        run()
        if index > 1:
            taken.append(time.thread_time() - begun)
    return statistics.median(taken)
