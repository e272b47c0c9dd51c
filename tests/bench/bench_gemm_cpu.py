"""The packed product beside torch's, for the matrices of SmolLM2-135M: `python -m tests.bench.bench_gemm_cpu`.

Weights come from memory, as in a model: each call takes the next of several copies. Medians; ratios of torch to ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from tenora_kernels.cpu.products.gemm import PackedMatrix, matmul
from tenora_kernels.cpu.runtime.team import Team

SHAPES = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)
BYTES = 128 * 2**20  # of float32 weights: more than any cache holds


def main() -> None:
    """Print one line per matrix and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    team = Team(options.threads)
    print(f"{'matrix':10}{'rows':>6}{'ours':>10}{'torch':>10}{'ratio':>8}{'GFLOP/s':>9}{'GB/s':>7}")
    for name, (n, k) in SHAPES.items():
        weight = torch.randn(n, k).bfloat16()
        copies = max(1, BYTES // (4 * n * k))
        packed = [PackedMatrix.pack(weight) for _ in range(copies)]
        plain = [weight.float() for _ in range(copies)]
        for rows in options.rows:
            if name == "head" and rows > 64:  # the head sees the last position of each sequence only
                continue
            x = torch.randn(rows, k)
            ours = median(lambda: [matmul(x, matrix, team) for matrix in packed], options.repeats) / copies  # noqa: B023
            theirs = median(lambda: [F.linear(x, matrix) for matrix in plain], options.repeats) / copies  # noqa: B023
            flops, read = 2 * rows * n * k, 2 * n * k
            print(
                f"{name:10}{rows:6}{ours * 1e6:8.0f}us{theirs * 1e6:8.0f}us{theirs / ours:8.2f}"
                f"{flops / ours / 1e9:9.0f}{read / ours / 1e9:7.1f}",
                flush=True,
            )


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the middle one of several runs, after two that do not count."""
    run()
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
