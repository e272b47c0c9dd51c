"""Runs one step on the model: builds what the layers need, one forward pass, logits where needed, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tenora.engine.block_tables import BlockTables
from tenora.engine.messages import Generate, Pool, SamplingParams, TokenLogprob
from tenora.engine.pooling import Heads, layers_of, pooled
from tenora.engine.sampler import describe, sample
from tenora.engine.scheduler import Scheduled
from tenora.engine.sequence import SequenceState
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.base import Batch, Executor, Integers
from tenora.model.to_device import to_device
from tenora_kernels.layout import LoraTables

_SCORED_ROWS = 64  # prompt positions whose logits exist at the same time: 64 rows of 150k tokens are 37 MiB


@dataclass(slots=True)
class Result:
    """What a step gave one sequence.

    Attributes:
        token: the next token; None if the step did not reach the sequence's end, -1 if its logits were not finite.
        logprob: of the token, if asked for.
        prompt_logprobs: of the prompt tokens that follow this chunk's positions, if asked for.
        pooled: of a `Pool`, once the step reaches the sequence's end: the answer, float32; empty if the adapter has no
            such head.
    """

    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooled: Tensor | None = None


class ModelRunner:
    """One decoder, its KV cache, and whoever computes its steps; the heads of its adapters, if they may have some."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, executor: Executor, tables: LoraTables, heads: Heads | None = None
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.executor = executor
        self.heads = heads
        self._tables = tables
        self._block_tables = BlockTables()

    # Not inference_mode: a tensor made there and kept (a lazily packed weight, say) could not take part in training.
    @torch.no_grad()
    def run(self, batch: Sequence[Scheduled]) -> list[Result]:
        """Compute the scheduled tokens and sample where a sequence's end is reached; results in the batch's order."""
        order = self._tables.order([item.slot for item in batch]).tolist()
        items = [batch[index] for index in order]
        states = self._states(items, layers_of(items))
        hidden = states[-1]
        results = [Result() for _ in batch]
        rows: list[int] = []  # of hidden, whose logits are sampled
        chosen: list[int] = []  # their places in the batch
        end = 0
        for index, item in zip(order, items, strict=True):
            sequence, start, end = item.sequence, end, end + item.count
            if sequence.sampling.max_tokens > 0 and item.samples:
                rows.append(end - 1)
                chosen.append(index)
            if isinstance(sequence.request, Pool):
                found = states[sequence.request.layer][start:end]
                results[index].pooled = pooled(item, sequence.request, found, self.heads)
            elif sequence.wants_prompt_logprobs:
                results[index].prompt_logprobs = self._score_prompt(item, hidden[start:end])
        if chosen:
            if len(rows) < end:
                hidden = hidden[to_device(torch.tensor(rows), hidden.device)]
            sampled = sample(self.decoder.logits(hidden), [batch[index].sequence for index in chosen])
            for index, token, logprob in zip(chosen, sampled.token_ids, sampled.logprobs, strict=True):
                results[index].token = token
                results[index].logprob = logprob
        return results

    def warm_up(self, max_tokens: int) -> None:
        """Capture and compile what steps of up to `max_tokens` do, while nothing runs: no request shall wait.

        Prompts of nothing, in the first blocks of the empty cache, are what compiles the kernels for chunks.
        """
        for length in self.executor.warm_up(max_tokens):
            sampling = SamplingParams(temperature=0.0, max_tokens=1)
            prompt = SequenceState.start(Generate(request_id="", token_ids=[0] * length, sampling=sampling), arrival=0)
            prompt.slot = 0  # of an empty pool: it adapts nothing
            prompt.block_table = list(range(-(-length // self.cache.block_size)))
            self.run([Scheduled(prompt, 0, length)])
            prompt.block_table.clear()

    def check_integrity(self) -> None:
        """Raise unless the block tables that are kept are those of the sequences."""
        self._block_tables.check_integrity()

    def _states(self, items: Sequence[Scheduled], layers: Sequence[int]) -> Mapping[int, Tensor]:
        """Hidden states [T, H] of the layers, -1 among them, of the items' tokens."""
        batch = self._batch(items)
        if len(layers) == 1:
            return {-1: self.executor.run(batch)}
        return dict(zip(layers, self.executor.states(batch, layers), strict=True))

    def _batch(self, items: Sequence[Scheduled]) -> Batch:
        """The stream of the items' tokens."""
        sequences = [item.sequence for item in items]
        starts = np.array([item.sequence.offset + item.start for item in items])  # in the cache
        counts = np.array([item.count for item in items])
        query_start = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        row = np.repeat(np.arange(len(items)), counts)  # of each token, in what there is per sequence
        positions = np.arange(len(row)) - query_start[row] + starts[row]
        block_tables = self._block_tables.update([sequence.block_table for sequence in sequences])
        block, offset = np.divmod(positions, self.cache.block_size)
        kv_slots = block_tables[row, block] * np.int64(self.cache.block_size) + offset
        lengths = self._lengths(sequences, row, positions)
        token_ids: list[int] = []
        for item in items:
            token_ids += item.sequence.token_ids[item.start : item.start + item.count]
        adapters = np.array([item.slot for item in items])
        return Batch(token_ids, positions, kv_slots, adapters, block_tables, lengths, query_start)

    def _lengths(self, sequences: Sequence[SequenceState], row: Integers, positions: Integers) -> Integers | None:
        """What each token is rotated for (see `Rotary.table`): the prompt as a whole, then one more with each token."""
        if not self.decoder.rotary.depends_on_length:
            return None
        prompts = np.array([sequence.num_prompt for sequence in sequences])
        lengths: Integers = np.maximum(prompts[row], positions + 1)
        return lengths

    def _score_prompt(self, item: Scheduled, hidden: Tensor) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens after this chunk's positions that were not scored before."""
        sequence = item.sequence
        done = len(sequence.prompt_logprobs or ())
        first = max(item.start, done - 1)  # position p scores token p + 1
        last = min(item.start + item.count, sequence.num_prompt - 1)
        scored: list[TokenLogprob] = []
        for start in range(first, last, _SCORED_ROWS):
            stop = min(start + _SCORED_ROWS, last)
            logits = self.decoder.logits(hidden[start - item.start : stop - item.start])
            tokens = sequence.token_ids[start + 1 : stop + 1]
            top = sequence.sampling.prompt_logprobs or 0
            scored += describe(torch.log_softmax(logits, dim=-1), tokens, [top] * len(tokens))
        return scored
