"""Steps that hold a chunk of a prompt beside rows that decode: what the host launches one by one, beside the tokens."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from tenora.engine.messages import Generate, SamplingParams
from tenora.engine.model_runner import ModelRunner
from tenora.engine.scheduler import Scheduled
from tenora.engine.sequence import SequenceState
from tenora.model.executors.adapters import AdapterRows
from tenora.model.executors.cuda_graphs import GraphExecutor
from tests.bench.gpu.engine_loop import BLOCK, EngineLoop
from tests.engine.graphs import Rerun

STEPS = ((512, 32), (2048, 64))
"""Tokens of the chunk, rows that decode."""


def batch(loop: EngineLoop, chunk: int, rows: int, slots: list[int]) -> list[Scheduled]:
    """The chunk of a sequence of its own, whole, in the blocks behind those of the rows that decode."""

    def sequence(number: int, tokens: int, blocks: range, slot: int) -> SequenceState:
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        made = SequenceState.start(Generate(request_id=str(number), token_ids=[1] * tokens, sampling=sampling), number)
        made.block_table, made.slot = list(blocks), slot
        return made

    found = []
    for row in range(rows):
        blocks = range(row * loop.blocks, (row + 1) * loop.blocks)
        found.append(Scheduled(sequence(row, loop.context, blocks, slots[row % len(slots)]), loop.context - 1, 1))
    first = rows * loop.blocks
    blocks = range(first, first + -(-chunk // BLOCK))
    found.append(Scheduled(sequence(rows, chunk, blocks, slots[0]), 0, chunk))
    return found


def run(loop: EngineLoop, lora: AdapterRows, steps: tuple[tuple[int, int], ...] = STEPS) -> list[dict[str, Any]]:
    """Milliseconds of a step to its tokens, without adapters and with one in every row, as far as the cache goes."""
    executor = GraphExecutor(loop.decoder, loop.cache, loop.graphs(lora, Rerun))
    runner = ModelRunner(loop.decoder, loop.cache, executor, loop.tables)
    results = []
    for chunk, rows in steps:
        if rows * loop.blocks + -(-chunk // BLOCK) > loop.cache.num_blocks:
            continue
        times = {}
        for name, slots in (("base_ms", [-1]), ("adapters_ms", list(range(loop.tables.slots)))):
            work, taken = batch(loop, chunk, rows, slots), []
            for turn in range(13):
                started = time.perf_counter()
                runner.run(work)
                if turn >= 3:
                    taken.append(1e3 * (time.perf_counter() - started))
            times[name] = round(median(taken), 3)
        results.append(
            {"chunk": chunk, "rows": rows, **times, "ratio": round(times["adapters_ms"] / times["base_ms"], 4)}
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return results
