"""Random adapters to measure with: written as bfloat16 PEFT directories, imported, and deleted again."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tenora.adapters.peft_format import write_adapter
from tenora.adapters.targets import TargetModule
from tenora.training.spec import LoraSpec
from tenora_client import Client

B_DEVIATION = 0.01
"""Of the random B. PEFT starts B at zero, which would make every adapter answer like the base."""


def as_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of `values` as bfloat16, rounded to the nearest, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def write_random_adapter(
    directory: Path,
    targets: Sequence[TargetModule],
    *,
    rank: int,
    seed: int,
    base_model: str = "base",
    modules: tuple[str, ...] = (),
) -> Path:
    """Write an adapter of random bfloat16 weights: A uniform as PEFT starts it, B normal with deviation 0.01.

    Args:
        directory: does not exist yet.
        targets: the modules of the base.
        rank: of every module.
        seed: equal seeds, equal adapters.
        base_model: what adapter_config.json names as its base.
        modules: last parts of the paths to adapt; empty: all.
    """
    source = np.random.default_rng(seed)
    weights = {}
    for target in targets:
        if modules and target.name not in modules:
            continue
        bound = 1 / np.sqrt(target.in_features)
        a = source.random((rank, target.in_features), dtype=np.float32) * np.float32(2 * bound) - np.float32(bound)
        b = source.standard_normal((target.out_features, rank), dtype=np.float32) * np.float32(B_DEVIATION)
        weights[target.path] = (as_bfloat16(a), as_bfloat16(b))
    shape = LoraSpec(rank=rank, alpha=2.0 * rank, target_modules=modules)
    write_adapter(directory, base_model=base_model, lora=shape, modules=weights)
    return directory


@dataclass(frozen=True, slots=True)
class Subject:
    """An imported adapter; `import_seconds` is how long the upload and the server's checks took."""

    name: str
    rank: int
    import_seconds: float


def import_random(
    client: Client, targets: Sequence[TargetModule], ranks: Sequence[int], *, prefix: str, seed: int
) -> Iterator[Subject]:
    """Make and import one adapter per entry of `ranks`, one after the other; each is on disk here only until then."""
    with tempfile.TemporaryDirectory(prefix="tenora-bench-") as folder:
        for index, rank in enumerate(ranks):
            name = f"{prefix}-r{rank}-{index:04d}"
            directory = write_random_adapter(Path(folder) / name, targets, rank=rank, seed=seed + index)
            started = time.perf_counter()
            client.adapters.import_(name, directory)
            took = time.perf_counter() - started
            shutil.rmtree(directory)
            yield Subject(name, rank, took)


@contextmanager
def imported(
    client: Client, targets: Sequence[TargetModule], ranks: Sequence[int], *, prefix: str, seed: int, keep: bool = False
) -> Iterator[list[Subject]]:
    """Adapters that are deleted when the block ends, unless `keep`."""
    with ExitStack() as stack:
        subjects = []
        for subject in import_random(client, targets, ranks, prefix=prefix, seed=seed):
            if not keep:
                stack.callback(client.adapters.delete, subject.name)
            subjects.append(subject)
        yield subjects
