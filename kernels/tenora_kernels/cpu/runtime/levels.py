"""Levels of x86-64 processors, for which kernels may come compiled.

Names and features: the System V psABI for x86-64 ("micro-architecture levels").
"""

from __future__ import annotations

from collections.abc import Mapping

import llvmlite.binding
from numba.core import config

__all__ = ["LEVELS", "best_level", "target_features"]

_V3 = (
    *("cx16", "sahf", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3"),
    *("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"),
)
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

LEVELS: Mapping[str, str] = {
    name: ",".join(f"+{feature}" for feature in features) for name, features in (("x86-64-v4", _V4), ("x86-64-v3", _V3))
}
"""The best one first, with its features as LLVM wants them."""


def target_features() -> Mapping[str, bool]:
    """What the processor can do for which Numba compiles: this one, unless NUMBA_CPU_FEATURES names another's."""
    if config.CPU_FEATURES is None:
        return dict(llvmlite.binding.get_host_cpu_features())
    return {entry[1:]: entry[0] == "+" for entry in config.CPU_FEATURES.split(",") if entry}


def best_level() -> str | None:
    """The highest level whose code runs here; None on another architecture, or on an older processor."""
    able = target_features()
    levels = (name for name, features in LEVELS.items() if all(able.get(part[1:]) for part in features.split(",")))
    return next(levels, None)
