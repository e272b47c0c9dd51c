"""A training pass of one adapter of rank 16, forward and backward, by the type of the weights that it reads."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch

from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.model.executors.layers import Keep
from tenora.model.spec import table_rows
from tenora.training.arena import TrainingArena
from tenora.training.packing import pack
from tenora.training.spec import LoraSpec
from tenora.training.step import Part, forward_backward, load_pass

TOKENS = (2048, 8192)
ROW = 256
PEAK = 989e12
"""Dense bfloat16 of an H100 or H200, per second."""


def rows_of(count: int, length: int) -> TokenizedDataset:
    """Rows of random tokens, the second half of each learned."""
    rng = np.random.default_rng(0)
    marks = np.tile(np.arange(length) >= length // 2, count).astype(np.uint8)
    return TokenizedDataset(
        tokens=rng.integers(3, 300, count * length).astype(np.int32),
        weights=marks,
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        lines=np.arange(1, count + 1, dtype=np.int64),
    )


def measure(decoder: Decoder, tokens: int, weights: torch.dtype, *, rounds: int = 5, row: int = ROW) -> dict[str, Any]:
    """Figures of a pass that keeps its layers' inputs. `weights`: of the arena that is read, not of the masters."""
    arena = TrainingArena(table_rows(decoder.spec), device=decoder.device, dtype=weights)
    adapter = arena.add(LoraSpec(rank=16, alpha=32.0))
    adapter.initialise(0)
    count = tokens // row
    packed = pack(rows_of(count, row), range(count))
    taken = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
            started = time.perf_counter()
            batch = load_pass(decoder, [Part(packed, adapter)], arena.tables)
            share = torch.full((len(batch.targets),), 1 / len(batch.targets), device=decoder.device)
            for _ in (work := forward_backward(decoder, batch, share, keep=Keep.INPUTS)):
                pass
            del work, batch
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
            taken.append(time.perf_counter() - started)
    seconds = median(taken[2:])
    parameters = decoder.spec.num_layers * sum(site.input * site.output for site in decoder.spec.layout.sites)
    useful = 4 * parameters * tokens  # forward, and the gradient of the input; what runs a second time does not count
    return {
        "tokens": tokens,
        "weights": str(weights).removeprefix("torch."),
        "ms": round(1e3 * seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "mfu": round(useful / seconds / PEAK, 4),
    }


def run(decoder: Decoder) -> list[dict[str, Any]]:
    """Passes of `TOKENS` tokens, on float32 weights and on a copy in the base's type, in turn."""
    return [measure(decoder, tokens, weights) for tokens in TOKENS for weights in (torch.float32, decoder.dtype)]
