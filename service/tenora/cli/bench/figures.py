"""Statistics of measured times, and the facts that every report of `tenora bench` begins with."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenora import __version__


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, linear between neighbours; NaN of no values.

    Source: Hyndman & Fan 1996, definition 7, numpy's default.
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The middle value; NaN of no values."""
    return percentile(values, 50)


def spread(values: Sequence[float], *, scale: float = 1.0) -> dict[str, float | int | None]:
    """count, mean, p50, p95, p99 and max of `values`, each times `scale`; all but the count are None of no values."""
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None, "max": None}
    return {
        "count": len(values),
        "mean": scale * sum(values) / len(values),
        "p50": scale * percentile(values, 50),
        "p95": scale * percentile(values, 95),
        "p99": scale * percentile(values, 99),
        "max": scale * max(values),
    }


def head(kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The beginning of a report: what was measured, with what parameters, on which machine, by which version."""
    return {
        "kind": kind,
        "version": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "parameters": dict(parameters),
    }


def machine() -> dict[str, Any]:
    """Processor, the cores that this process may use, operating system and Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
