"""Runs one step on the model: builds what the layers need, one forward pass, logits where needed, tokens."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenora.engine.messages import TokenLogprob
from tenora.engine.sampler import describe, sample
from tenora.engine.scheduler import Scheduled
from tenora.model.attention import PagedAttention
from tenora.model.cache import KVCache
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments

_SCORED_ROWS = 64  # prompt positions whose logits exist at the same time: 64 rows of 150k tokens are 37 MiB


@dataclass(slots=True)
class Result:
    """What a step gave one sequence.

    Attributes:
        token: the next token; None if the step did not reach the sequence's end, -1 if its logits were not finite.
        logprob: of the token, if asked for.
        prompt_logprobs: of the prompt tokens that follow this chunk's positions, if asked for.
    """

    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class ModelRunner:
    """One decoder with its KV cache and adapter tables."""

    def __init__(self, decoder: Decoder, cache: KVCache, tables: LoraTables) -> None:
        self.decoder = decoder
        self.cache = cache
        self.tables = tables

    # Not inference_mode: a tensor made there and kept (a lazily packed weight, say) could not take part in training.
    @torch.no_grad()
    def run(self, batch: Rows[Scheduled]) -> list[Result]:
        """Compute the scheduled tokens and sample where a sequence's end is reached; results in the batch's order."""
        order = sorted(range(len(batch)), key=lambda index: batch[index].sequence.slot)  # rows of a slot lie together
        items = [batch[index] for index in order]
        hidden = self.decoder(*self._inputs(items))
        results = [Result() for _ in batch]
        sampling: list[tuple[int, int]] = []  # row of hidden, index in batch
        start = 0
        for index, item in zip(order, items, strict=True):
            end = start + item.count
            if item.samples and item.sequence.sampling.max_tokens > 0:
                sampling.append((end - 1, index))
            if item.sequence.wants_prompt_logprobs:
                results[index].prompt_logprobs = self._score_prompt(item, hidden[start:end])
            start = end
        if sampling:
            logits = self.decoder.logits(hidden[torch.tensor([row for row, _ in sampling], device=hidden.device)])
            sampled = sample(logits, [batch[index].sequence for _, index in sampling])
            for (_, index), token, logprob in zip(sampling, sampled.token_ids, sampled.logprobs, strict=True):
                results[index].token = token
                results[index].logprob = logprob
        return results

    def _inputs(self, items: Rows[Scheduled]) -> tuple[Tensor, ForwardContext]:
        """The stream of token ids [T] and its context."""
        token_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        slots: list[int] = []
        query_start = [0]
        size = self.cache.block_size
        for item in items:
            sequence, end = item.sequence, item.start + item.count
            token_ids += sequence.token_ids[item.start : end]
            positions += range(item.start, end)
            slot_mapping += [sequence.block_table[at // size] * size + at % size for at in range(item.start, end)]
            slots += [sequence.slot] * item.count
            query_start.append(len(token_ids))
        where = self._tensor(positions)
        attention = PagedAttention(
            self.cache,
            self._tensor(slot_mapping),
            query_start,
            [item.start + item.count for item in items],
            self._block_tables(items),
        )
        lora = None
        if any(slot >= 0 for slot in slots):
            lora = LoraBatch(self.tables, build_segments(slots, device=where.device))
        rope = self.decoder.rope(where, self._lengths(items))
        return self._tensor(token_ids), ForwardContext(where, rope, attention, lora)

    def _block_tables(self, items: Rows[Scheduled]) -> Tensor:
        width = max(len(item.sequence.block_table) for item in items)
        tables = [item.sequence.block_table + [0] * (width - len(item.sequence.block_table)) for item in items]
        return torch.tensor(tables, dtype=torch.int32, device=self.decoder.device)

    def _lengths(self, items: Rows[Scheduled]) -> Tensor | None:
        """What each token is rotated for (see `Rotary.table`): the prompt as a whole, then one more with each token."""
        if not self.decoder.rotary.depends_on_length:
            return None
        return self._tensor(
            [
                max(item.sequence.num_prompt, position + 1)
                for item in items
                for position in range(item.start, item.start + item.count)
            ]
        )

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

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.decoder.device)
