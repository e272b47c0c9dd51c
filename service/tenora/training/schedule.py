"""The course of a run: its learning rate, with a linear warm-up and then a decay or none, and where it is measured."""

from __future__ import annotations

import math

from tenora.training.settings import Scheduler


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_ratio: float, scheduler: Scheduler) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    The curves are those of `transformers.get_scheduler` with `warmup_steps(...)` and `total_steps + 1`, read one step
    later: neither the first nor the last step is spent at a rate of zero, which matters in runs of a few dozen steps.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    position, end = step + 1, total_steps + 1
    if position < warmup:
        return peak * position / max(1, warmup)
    if scheduler == "constant":
        return peak
    progress = (position - warmup) / max(1, end - warmup)
    factor = 1.0 - progress if scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * max(0.0, factor)


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps of warm-up: the ratio of all steps, rounded up."""
    return math.ceil(total_steps * warmup_ratio)


def evaluation_steps(total_steps: int, interval: int) -> list[int]:
    """The steps after which a run is measured, besides step 0: every `interval` of them, and the last one."""
    return [*range(interval, total_steps, interval), total_steps]
