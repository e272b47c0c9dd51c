"""Device times from CUDA graphs: what a step costs when nothing of Python is in it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of one replay: the median and the 10th percentile."""

    median: float
    low: float


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after two runs that compile and allocate."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def measure(graphs: dict[str, torch.cuda.CUDAGraph], *, rounds: int = 30) -> dict[str, Times]:
    """Times of several graphs, in turn within every round, so that they share the device's state."""
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 3):
        for name, graph in graphs.items():
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:  # the first rounds warm the clocks up
                taken[name].append(start.elapsed_time(end))
    return {name: summary(values) for name, values in taken.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def summary(values: list[float]) -> Times:
    """Median and 10th percentile."""
    ordered = sorted(values)
    return Times(statistics.median(ordered), ordered[len(ordered) // 10])


def copy_bandwidth() -> float:
    """Bytes per second that a kernel reads and writes together over 1 GiB: the ceiling that GB/s are compared with.

    A kernel, because a memory copy of the driver reached two thirds of it on an H200.
    """
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)

    def copy() -> None:
        torch.neg(source, out=target)

    times = measure({"copy": captured(copy)}, rounds=10)
    return 8 * source.numel() / (times["copy"].median / 1e3)
