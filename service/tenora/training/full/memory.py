"""Whether a full fine-tuning fits beside everything else on this machine. Free of torch.

What a process may take is what the machine has left, and no more than what the control group of a container leaves of
its limit: there the kernel kills where the machine would still have room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tenora.errors import InvalidRequestError, TrainingError
from tenora.model.spec import ModelSpec
from tenora.training.full.selection import Selection, needed_bytes, parameters

_UNLIMITED = 2**60  # what version 1 says where there is no limit is just below 2⁶³


def admit(spec: ModelSpec, selection: Selection, longest_row: int, available: int) -> None:
    """Let a job begin whose memory is there.

    Raises:
        TrainingError: code insufficient_memory; the message has the bytes that it needs and those that there are.
    """
    needed = needed_bytes(spec, selection, longest_row)
    if needed <= available:
        return
    trained = selection.trained(spec)
    raise TrainingError(
        f"Full fine-tuning of {trained:,} of the base's {parameters(spec):,} weights needs {needed:,} bytes of memory "
        f"(16 for each weight that is trained, 4 for each other one, and activations), and {available:,} are "
        'available. Train fewer layers (layers: "last 4"), use shorter rows, or train an adapter.',
        code="insufficient_memory",
    )


def require_memory(base: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a job that this machine could not hold if it was empty; `base` is the directory of the base.

    Raises:
        InvalidRequestError: the layers are none of the base's, or memory could never suffice.
        UnsupportedModelError: the base cannot be read.
    """
    spec = ModelSpec.from_directory(base)
    try:
        admit(spec, Selection.of(settings, spec), 0, total_bytes())
    except TrainingError as error:
        raise InvalidRequestError(error.message, code=error.code, param="method") from error


def available_bytes(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Bytes that a new process can have now."""
    machine = _meminfo(proc, "MemAvailable")
    return max(0, min([machine, *(limit - used for limit, used in _groups(root, proc))]))


def total_bytes(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Bytes that there would be if nothing else ran."""
    return min([_meminfo(proc, "MemTotal"), *(limit for limit, _ in _groups(root, proc))])


def _meminfo(proc: Path, name: str) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc / 'meminfo'} does not say {name}")


def _groups(root: Path, proc: Path) -> Iterator[tuple[int, int]]:
    """Limit of each control group that this process is in, and what is used of it and cannot be taken back."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        base = root if controllers == "" else root / "memory"
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own = base / path.lstrip("/")
        # A container sees its own group as the root, whatever its path is outside.
        for group in dict.fromkeys((own, *own.parents, base)):
            if group == base or base in group.parents:
                yield from _group(group, *names)


def _group(group: Path, limit_name: str, used_name: str, reclaimable: str) -> Iterator[tuple[int, int]]:
    try:
        limit = (group / limit_name).read_text().strip()
        used = int((group / used_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if limit != "max" and int(limit) < _UNLIMITED:
        yield int(limit), used - int(stat.get(reclaimable, 0))
