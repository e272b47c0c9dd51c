"""What processes hold, from /proc."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIB = 2**20


def memory(processes: Mapping[str, int], parameters: int, *, adapter_bytes: int, kv_bytes: int) -> dict[str, Any]:
    """Proportional set sizes in MiB, and what is left of their sum after each thing that must be there.

    Args:
        processes: ids by name.
        parameters: of the base.
        adapter_bytes: that the resident adapters take as bfloat16.
        kv_bytes: of the KV cache as configured. What of it was never written is not resident, so two rests are given.
    """
    sizes = {name: proportional_set_size(pid) for name, pid in processes.items()}
    total = sum(sizes.values())
    rest = total - adapter_bytes
    return {
        "total_mib": total / MIB,
        **{f"{name}_mib": size / MIB for name, size in sizes.items()},
        "weights_bfloat16_mib": 2 * parameters / MIB,
        "weights_float32_mib": 4 * parameters / MIB,
        "adapters_mib": adapter_bytes / MIB,
        "kv_configured_mib": kv_bytes / MIB,
        "rest_beyond_bfloat16_weights_mib": (rest - 2 * parameters - kv_bytes) / MIB,
        "rest_beyond_float32_weights_mib": (rest - 4 * parameters - kv_bytes) / MIB,
        "rest_beyond_float32_weights_if_kv_untouched_mib": (rest - 4 * parameters) / MIB,
    }


def proportional_set_size(pid: int) -> int:
    """Bytes that a process holds, pages that several share counted in part (`Pss` of proc(5), smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pss":
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")
