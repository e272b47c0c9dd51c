"""Compiling the kernels that a base needs ahead of its first request, in several processes at once.

Numba compiles one function at a time in a process, so the jobs are shared out among forks of one that has planned them.
What they compile goes through the cache on disk; whoever wants to use it reads it from there.

`python -m tenora_kernels.cpu.precompile [LEVEL …]` compiles everything that bfloat16 bases need, for an image: for this
processor, or for levels of them (see `levels`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from numba import typeof, types

from tenora_kernels.cpu.attention import attention
from tenora_kernels.cpu.decoder import layers, losses
from tenora_kernels.cpu.decoder.stack import PackedLayer, PackedStack
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.cpu.products.gemm import PANEL, PackedMatrix
from tenora_kernels.cpu.runtime import cache, team
from tenora_kernels.cpu.runtime.cache import Progress
from tenora_kernels.cpu.runtime.levels import LEVELS
from tenora_kernels.cpu.runtime.team import Team, noting
from tenora_kernels.cpu.runtime.values import SAMPLES
from tenora_kernels.cpu.runtime.watch import reachable, watching
from tenora_kernels.layout import LoraSite

__all__ = ["Wanted", "plan", "precompile", "wait_for_others"]

Report = Callable[[int, int, int], None]
_POLL_SECONDS = 0.2
_NUMBER = struct.Struct("<H")
_PR_SET_PDEATHSIG = 1


class Wanted(NamedTuple):
    """What a base asks of the kernels.

    Attributes:
        dtype: that it computes in.
        packed: whether its matrices are; is_bf16: as bfloat16.
        head_dim: of its attention.
        train: whether adapters are trained on it, too.
    """

    dtype: torch.dtype
    packed: bool
    is_bf16: bool
    head_dim: int
    train: bool


class Job(NamedTuple):
    """A compiled function and the types of its arguments."""

    kernel: Any
    signature: tuple[Any, ...]


def plan(wanted: Wanted) -> list[Job]:
    """Every job that Python will call, found by going through the motions on a decoder of one layer; longest first."""
    with noting() as noted:
        if wanted.packed:
            stack = _smallest(wanted)
            stack.warm_up(train=wanted.train)
            if wanted.train and layers.supports(stack, None):
                layers.warm_up(stack)
                losses.warm_up(stack)
        elif attention.supports(wanted.dtype, wanted.head_dim):
            attention.warm_up(wanted.dtype)
    jobs = {Job(kernel, signature): None for kernel, signature in noted}
    jobs |= dict.fromkeys(Job(kernel, (types.int64,)) for kernel in team.JOBS)
    if (wanted.train or not wanted.packed) and wanted.dtype in SAMPLES:
        sample = typeof(SAMPLES[wanted.dtype])
        calls = lora.JOBS if wanted.train else lora.FORWARD_JOBS
        jobs |= dict.fromkeys(Job(kernel, (types.int64, types.int64, sample)) for kernel in calls)
        jobs[Job(lora.plan_forward, (types.int64, types.int64))] = None
    return sorted(jobs, key=lambda job: -len(reachable([job.kernel])))


def _smallest(wanted: Wanted) -> PackedStack:
    """A decoder of one layer with the kinds of weights that the base has."""
    dim, size = wanted.head_dim, PANEL * wanted.head_dim
    weight_type = torch.bfloat16 if wanted.is_bf16 else torch.float32

    def matrix(rows: int, columns: int) -> PackedMatrix:
        return PackedMatrix.pack(torch.zeros(rows, columns, dtype=weight_type))

    table, norm = matrix(PANEL, PANEL), torch.ones(PANEL)
    matrices = matrix(3 * size, PANEL), matrix(PANEL, size), matrix(2 * PANEL, PANEL), matrix(PANEL, PANEL)
    layer = PackedLayer(*matrices, norm, norm)
    sites = [LoraSite(number, each.in_features, ((0, each.out_features),)) for number, each in enumerate(matrices)]
    return PackedStack(
        heads=PANEL, kv_heads=PANEL, head_dim=dim, mlp=PANEL, activation="silu", eps=1e-5, table=table, head=table,
        layers=[layer], sites=sites, final_norm=norm, team=Team(1),
    )  # fmt: skip


def precompile(jobs: Iterable[Job], processes: int, report: Callable[[Progress], None]) -> None:
    """Compile what the cache does not hold yet. Must be called by a process of one thread: it forks.

    Args:
        jobs: what to compile; the first ones are begun first.
        processes: how many to use.
        report: called for each kernel that is done.
    """
    jobs = list(jobs)
    kernels = list(reachable(job.kernel for job in jobs))
    numbers = {kernel: number for number, kernel in enumerate(kernels)}
    missing = [job for job in jobs if not job.kernel.holds(job.signature)]
    done = reachable(job.kernel for job in jobs if job not in missing)
    found = len(done)
    report(Progress(found, len(kernels), found))
    if not missing:
        return
    queue, results = os.pipe(), os.pipe()
    os.write(queue[1], bytes(range(len(missing))))
    os.close(queue[1])
    children = [_fork(missing, numbers, queue[0], results) for _ in range(min(processes, len(missing)))]
    os.close(queue[0])
    os.close(results[1])
    while message := os.read(results[0], _NUMBER.size):
        done.add(kernels[_NUMBER.unpack(message)[0]])
        report(Progress(len(done), len(kernels), found))
    os.close(results[0])
    for child in children:
        os.waitpid(child, 0)


def _fork(missing: list[Job], numbers: dict[Any, int], queue: int, results: tuple[int, int]) -> int:
    """A child that compiles job after job of those that nobody has begun, and tells each kernel that is done."""
    parent = os.getpid()
    if child := os.fork():
        return child
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.close(results[0])

        def tell(kernel: Any) -> None:
            if kernel in numbers:
                os.write(results[1], _NUMBER.pack(numbers[kernel]))

        with watching(tell):
            while os.getppid() == parent and (taken := os.read(queue, 1)):
                job = missing[taken[0]]
                job.kernel.compile(job.signature)
                for kernel in reachable([job.kernel]):
                    tell(kernel)
        status = 0
    finally:
        os._exit(status)  # nothing of the parent's is to be ended here


def wait_for_others(report: Report) -> None:
    """Return when nobody compiles for the cache any more; tell meanwhile how far they are."""
    while (progress := cache.read_progress()) is not None:
        report(*progress)
        time.sleep(_POLL_SECONDS)


def main(levels: list[str]) -> None:
    """Compile for both ways in which a bfloat16 base is computed: packed in float32, and in bfloat16."""
    for level in levels:  # the processor for which Numba compiles is settled when it is imported
        environment = {**os.environ, "NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": LEVELS[level]}
        subprocess.run([sys.executable, "-m", "tenora_kernels.cpu.precompile"], env=environment, check=True)
    if levels:
        return
    torch.set_num_threads(1)
    for wanted in (Wanted(torch.float32, True, True, 64, True), Wanted(torch.bfloat16, False, False, 64, True)):
        precompile(plan(wanted), len(os.sched_getaffinity(0)), _print)


def _print(progress: Progress) -> None:
    sys.stdout.write(f"compiled {progress.done} of {progress.total} kernels\n")


if __name__ == "__main__":
    main(sys.argv[1:])
