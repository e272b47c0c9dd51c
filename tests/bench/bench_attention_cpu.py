"""Paged attention of the CPU beside torch's gathering path, in one run: `python -m tests.bench.bench_attention_cpu`.

Shape of SmolLM2-135M (9 query heads on 3 key heads of 64), float32, blocks of 16 in random order, several layers so
that the cache of the next one is not in the processor's. Medians; bytes are keys and values once, operations those of
the scores and the sums that causality leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tenora.model.attention import paged_attention
from tenora.model.cache import KVCache
from tenora.model.gathered import GatheredAttention
from tenora.model.spec import ModelSpec
from tenora_kernels.cpu.attention.attention import warm_up
from tenora_kernels.cpu.runtime.team import Team

HEADS, KV_HEADS, DIM, SIZE = 9, 3, 64, 16
SECONDS = 0.4  # for one figure
BUDGET = 200e6  # bytes of cache


def spec(layers: int) -> ModelSpec:
    return ModelSpec.from_config(
        {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        }
    )  # fmt: skip


def median(run: Callable[[int], object]) -> float:
    """Seconds of a call; `run` gets the number of the call."""
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure(name: str, contexts: list[int], counts: list[int], team: Team) -> None:
    """Print one line for sequences of these lengths, of which the last `counts` tokens are new."""
    blocks = [-(-context // SIZE) for context in contexts]
    used = sum(blocks) * SIZE * KV_HEADS * DIM * 8
    layers = max(1, min(30, int(BUDGET // used)))
    cache = KVCache.allocate(spec(layers), sum(blocks), SIZE)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    order = torch.randperm(sum(blocks)).split(blocks)  # type: ignore[no-untyped-call]  # torch
    tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).int()
    slots = torch.cat(
        [
            tables[sequence][at // SIZE].long() * SIZE + at % SIZE
            for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True))
            for at in (torch.arange(context - count, context),)
        ]
    )
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    q, k, v = torch.split(torch.randn(starts[-1], HEADS + 2 * KV_HEADS, DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
    ours = paged_attention(cache, slots, starts, contexts, tables, team=team)
    theirs = GatheredAttention(cache, slots, starts, contexts, tables)
    fast = median(lambda call: ours.attend(call % layers, q, k, v, None))
    slow = median(lambda call: theirs.attend(call % layers, q, k, v, None))
    pairs = sum(n * (c - n) + n * (n + 1) // 2 for c, n in zip(contexts, counts, strict=True))
    read, work = sum(contexts) * KV_HEADS * DIM * 8, 4 * HEADS * DIM * pairs
    print(
        f"{name:16} {slow / fast:6.2f}x {fast * 1e6:10.0f} µs {slow * 1e6:10.0f} µs in torch"
        f" {read / fast / 1e9:6.1f} GB/s {work / fast / 1e9:6.1f} GFLOP/s"
    )


@torch.no_grad()
def main() -> None:
    warm_up(torch.float32)
    team = Team(torch.get_num_threads())
    print(f"{team.size} threads")
    for rows in (1, 8, 32):
        for context in (100, 500, 2000):
            measure(f"decode {rows} x {context}", [context] * rows, [1] * rows, team)
    for length in (64, 512, 2048):
        measure(f"prefill {length}", [length], [length], team)
    measure("prefill 8 x 64", [64] * 8, [64] * 8, team)
    measure("chunk 256 at 768", [1024], [256], team)


if __name__ == "__main__":
    main()
