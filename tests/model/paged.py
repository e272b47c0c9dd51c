"""Drives a decoder through the paged cache with any schedule, as an engine would."""

from __future__ import annotations

import torch
from torch import Tensor

from tenora.model.attention import KVCache, paged_attention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder

Schedule = list[list[tuple[int, int]]]
"""Steps; a step is (sequence, number of its next tokens) in stream order."""


class PagedRun:
    """Sequences with shuffled blocks in a cache that is poisoned with NaN wherever nothing was written."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[Tensor],
        *,
        block_size: int = 4,
        spare: int = 5,
        prompt_lens: list[int] | None = None,
    ) -> None:
        self.decoder = decoder
        self.prompts = prompts
        self.prompt_lens = prompt_lens or [len(prompt) for prompt in prompts]
        needed = [-(-len(prompt) // block_size) for prompt in prompts]
        total = sum(needed) + spare
        self.cache = KVCache.allocate(decoder.spec, total, block_size, dtype=decoder.dtype)
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(float("nan"))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(3)).tolist()
        # Unused entries of the table point out of range: reading one raises.
        self.block_tables = torch.full((len(prompts), max(needed)), total + 1000, dtype=torch.int32)
        for sequence, count in enumerate(needed):
            self.block_tables[sequence, :count] = torch.tensor([order.pop() for _ in range(count)])
        self.done = [0] * len(prompts)

    @torch.inference_mode()
    def step(self, work: list[tuple[int, int]]) -> list[Tensor]:
        """Run the next tokens of some sequences in one stream; gives the logits of each."""
        ids, positions, lengths, slots, contexts, starts = [], [], [], [], [], [0]
        size = self.cache.block_size
        for sequence, count in work:
            first = self.done[sequence]
            self.done[sequence] += count
            span = range(first, first + count)
            ids.append(self.prompts[sequence][first : first + count])
            positions += span
            lengths += [max(self.prompt_lens[sequence], position + 1) for position in span]
            slots += [int(self.block_tables[sequence, p // size]) * size + p % size for p in span]
            contexts.append(first + count)
            starts.append(starts[-1] + count)
        where = torch.tensor(positions)
        attention = paged_attention(
            self.cache, torch.tensor(slots), starts, contexts, self.block_tables[[sequence for sequence, _ in work]]
        )
        context = ForwardContext(where, self.decoder.rope(where, torch.tensor(lengths)), attention)
        hidden = self.decoder(torch.cat(ids), context)
        return list(self.decoder.logits(hidden).split([count for _, count in work]))

    def run(self, schedule: Schedule) -> list[Tensor]:
        """Run every step; gives the logits of each sequence, [length, vocabulary]."""
        rows: list[list[Tensor]] = [[] for _ in self.prompts]
        for work in schedule:
            for (sequence, _), logits in zip(work, self.step(work), strict=True):
                rows[sequence].append(logits)
        return [torch.cat(parts) for parts in rows]
