"""Sequences that go through an executor step by step, as the engine's do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import HostAdapters
from tenora.model.executors.base import Batch, Executor
from tenora.model.executors.choice import executor_for
from tenora.model.executors.modules import ModulesExecutor
from tenora_kernels.layout import LoraTables
from tests.support.tiny import VOCAB

BLOCK = 16


class Stream:
    """Sequences that take any number of steps of any sizes in one cache, in the order that `Batch` promises.

    On the fastest executor there is, or on `modules`.
    """

    def __init__(
        self, decoder: Decoder, tables: LoraTables, slots: list[int], length: int, *, modules: bool = False
    ) -> None:
        self.decoder, self.tables, self.slots = decoder, tables, slots
        width = -(-length // BLOCK)
        self.cache = KVCache.allocate(decoder.spec, len(slots) * width, BLOCK)
        self.blocks = torch.arange(len(slots) * width, dtype=torch.int32).view(len(slots), width)
        self.executor: Executor = executor_for(
            decoder, self.cache, tables, max_rows=8, max_tokens=1024, max_context=length, max_rank=64
        )
        if modules:
            self.executor = ModulesExecutor(decoder, self.cache, HostAdapters(tables, decoder.device))
        self.done = [0] * len(slots)
        self.ids = torch.randint(0, VOCAB, (len(slots), length), generator=torch.Generator().manual_seed(1))
        self.logits: list[list[Tensor]] = [[] for _ in slots]

    @torch.no_grad()
    def step(self, counts: dict[int, int]) -> None:
        """Run the next tokens of some sequences."""
        given = list(counts)
        rows = [given[place] for place in self.tables.order([self.slots[row] for row in given])]
        starts, positions, places, ids = [0], [], [], list[int]()
        for row in rows:
            span = range(self.done[row], self.done[row] + counts[row])
            self.done[row] += counts[row]
            positions += span
            places += [int(self.blocks[row, p // BLOCK]) * BLOCK + p % BLOCK for p in span]
            ids += self.ids[row, span.start : span.stop].tolist()
            starts.append(starts[-1] + len(span))
        batch = Batch(
            ids,
            np.array(positions),
            np.array(places),
            np.array([self.slots[row] for row in rows]),
            self.blocks[rows].numpy(),
            query_start=np.array(starts),
        )
        hidden = self.executor.run(batch)
        for row, part in zip(rows, self.decoder.logits(hidden).split([counts[row] for row in rows]), strict=True):
            self.logits[row].append(part)

    def run(self, *steps: dict[int, int]) -> list[Tensor]:
        """Several steps; the logits of each sequence."""
        for counts in steps:
            self.step(counts)
        return [torch.cat(parts) if parts else torch.empty(0) for parts in self.logits]
