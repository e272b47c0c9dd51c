"""The largest step there can be, run once before memory is shared out: what it takes is not left to an estimate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tenora.engine.messages import Generate, SamplingParams
from tenora.engine.model_runner import ModelRunner
from tenora.engine.scheduler import Scheduled
from tenora.engine.sequence import SequenceState
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import HostAdapters
from tenora.model.executors.modules import ModulesExecutor
from tenora.model.spec import table_rows
from tenora_kernels.layout import LoraTables


def rehearse(decoder: Decoder, *, tokens: int, seqs: int, block_size: int) -> Callable[[], None]:
    """A step of `seqs` prompts, about `tokens` tokens in all, that samples for each of them with a filter.

    What it needs beside its activations (a cache of its own) is allocated here, not when it is called.
    """
    seqs = min(seqs, tokens)
    length = min(tokens // seqs, decoder.spec.max_position_embeddings)
    blocks = -(-length // block_size)
    cache = KVCache.allocate(decoder.spec, seqs * blocks, block_size, dtype=decoder.dtype, device=decoder.device)
    rows = table_rows(decoder.spec)
    tables = LoraTables.empty(
        torch.zeros(0, dtype=decoder.dtype, device=decoder.device),
        in_features=rows.in_features,
        out_features=rows.out_features,
        slots=1,
        low_rank_rows=rows.low_rank,
    )
    executor = ModulesExecutor(decoder, cache, HostAdapters(tables, decoder.device))
    runner = ModelRunner(decoder, cache, executor, tables)
    batch = []
    for number in range(seqs):
        sampling = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=1, seed=number)
        prompt = SequenceState.start(Generate(request_id="", token_ids=[0] * length, sampling=sampling), arrival=number)
        prompt.block_table = list(range(number * blocks, (number + 1) * blocks))
        batch.append(Scheduled(prompt, 0, length))

    def step() -> None:
        runner.run(batch)

    return step


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Most bytes of a GPU that `work` takes beside what is taken already."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
