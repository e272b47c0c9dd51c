"""The compiled low-rank op against the same in plain torch and against the base's own product of the group.

Run `python -m tests.bench.bench_lora_cpu`. Every line is medians of one run. Thirty layers' worth of adapters are gone
through in turn, as a decode step does, so weights come from where they come from in service: memory, not a cache.
GB/s counts the weights of the adapters in the batch at their true ranks, once. Shapes are SmolLM2-135M's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from tenora_kernels import huge_pages, torch_backend
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

GROUPS = {
    "qkv": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate_up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
LAYERS = 30


class Batch(NamedTuple):
    """Rows and the adapter of each."""

    name: str
    slots: list[int]
    train: bool = False


def batches(seed: int = 0) -> list[Batch]:
    """Decode steps of 1, 8 and 32 rows, a prompt, and training rows of one adapter."""
    zipf = np.random.default_rng(seed).zipf(1.5, size=32) - 1
    return [
        Batch("decode, 1 row", [0]),
        Batch("decode, 8 distinct", list(range(8))),
        Batch("decode, 32 distinct", list(range(32))),
        Batch("decode, 32 Zipf-1.5", [int(slot) % 32 for slot in zipf]),
        Batch("decode, 32 identical", [0] * 32),
        Batch("decode, 32, half base", [row if row % 2 else -1 for row in range(32)]),
        Batch("prefill, 512 rows", [0] * 512),
        Batch("train, 1000 rows", [0] * 1000, train=True),
    ]


def median(run: Callable[[], object], repeats: int) -> float:
    """Microseconds."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e6


def make_tables(
    columns: int, widths: Sequence[int], slots: int, rank: int, *, is_bf16: bool, train: bool
) -> LoraTables:
    """Every slot with random weights in every layer; one layer for training, which is not short of bytes."""
    layers = 1 if train else LAYERS
    inputs, outputs = [columns] * len(widths) * layers, list(widths) * layers
    size = rank * sum(inputs + outputs) // (2 if is_bf16 else 1)
    arena = huge_pages.empty(size * slots, torch.float32)
    (arena.view(torch.bfloat16) if is_bf16 else arena).normal_(std=0.05)
    grad = torch.zeros_like(arena) if train else None
    tables = LoraTables.empty(arena, in_features=inputs, out_features=outputs, slots=slots, grad=grad)
    for slot in range(slots):
        tables.place(slot, slot * size, [rank] * len(inputs), [1.0] * len(inputs), is_bf16=is_bf16)
    return tables


def measure(group: str, batch: Batch, rank: int, dtype: torch.dtype, *, is_bf16: bool, repeats: int) -> str:
    """One line of the table."""
    columns, widths = GROUPS[group]
    ends = np.cumsum(widths).tolist()
    slices = tuple((end - width, end) for end, width in zip(ends, widths, strict=True))
    is_bf16 = is_bf16 and not batch.train
    tables = make_tables(columns, widths, max(batch.slots) + 1, rank, is_bf16=is_bf16, train=batch.train)
    sites = [LoraSite(row, columns, slices) for row in range(0, tables.rows, len(widths))]
    step = LoraBatch(tables, build_segments(batch.slots))
    x = torch.randn(len(batch.slots), columns, dtype=dtype)
    y = torch.zeros(len(batch.slots), ends[-1], dtype=dtype)
    weight = torch.randn(ends[-1], columns, dtype=dtype)
    dx = torch.zeros(x.shape)

    def through(backend: object) -> Callable[[], None]:
        def run() -> None:
            for site in sites:
                if batch.train:
                    backend.backward(y, x, site, step, dx)  # type: ignore[attr-defined]
                else:
                    backend.forward(y, x, site, step)  # type: ignore[attr-defined]

        return run

    ours = median(through(lora), repeats) / len(sites)
    plain = median(through(torch_backend), max(3, repeats // 4)) / len(sites)
    product = median(lambda: [F.linear(x, weight) for _ in sites], repeats) / len(sites)
    numbers = rank * (columns * len(widths) + ends[-1])
    adapted = [slot for slot in batch.slots if slot >= 0]
    size = len(set(adapted)) * numbers * (2 if is_bf16 else 4)
    flops = 2 * len(adapted) * numbers * (3 if batch.train else 1)
    return (
        f"{batch.name:22} {group:8} {ours:9.1f} {size / ours / 1e3:7.1f} {flops / ours / 1e3:8.1f} {plain:10.1f} "
        f"{plain / ours:7.1f} {ours / product:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of x and y")
    parser.add_argument("--wide", action="store_true", help="adapters as float32; else bfloat16 in a float32 arena")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", default="", help="part of the name of the batches to run")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    lora.warm_up(dtype, train=True)
    print(f"rank {arguments.rank}, {dtype}, {torch.get_num_threads()} threads; µs, medians of {arguments.repeats}")
    print(
        f"{'batch':22} {'group':8} {'ours':>9} {'GB/s':>7} {'GFLOP/s':>8} {'torch':>10} {'torch/':>7} {'/product':>9}"
    )
    with torch.no_grad():
        for batch in batches():
            if arguments.only in batch.name:
                for group in GROUPS:
                    print(
                        measure(
                            group, batch, arguments.rank, dtype, is_bf16=not arguments.wide, repeats=arguments.repeats
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
