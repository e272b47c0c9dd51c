"""Paged attention in plain torch: gathers what each sequence has cached and calls torch's own attention.

Works on every device and in every type, and is what the faster ways are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tenora.model.cache import KVCache
from tenora.model.heads import TorchHeads

__all__ = ["GatheredAttention", "attend_one", "causal_mask"]


class GatheredAttention(TorchHeads):
    """Attention to everything that is cached of each sequence; arguments as those of `paged_attention`."""

    def __init__(
        self,
        cache: KVCache,
        kv_slots: Tensor,
        query_start: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Tensor,
    ) -> None:
        self._cache = cache
        self._kv_slots = kv_slots
        self._block_tables = block_tables.long()
        self._contexts = context_lens
        self._chunks: list[tuple[int, int, int]] = []  # sequence, first token, one past its last token
        decode: list[tuple[int, int]] = []  # sequence, token
        for sequence, (start, stop) in enumerate(pairwise(query_start)):
            if stop - start == 1 and self._contexts[sequence] > 1:
                decode.append((sequence, start))
            elif stop > start:
                self._chunks.append((sequence, start, stop))
        self._decode = self._buckets(decode)
        self._decode_plans: dict[int | None, list[_DecodePlan]] = {}
        self._chunk_plans: dict[int | None, list[_ChunkPlan]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`. The cache of `layer` is changed in place."""
        self._cache.write(layer, self._kv_slots, k, v)
        if window not in self._decode_plans:
            self._decode_plans[window] = [self._plan_decode(bucket, window) for bucket in self._decode]
            self._chunk_plans[window] = [self._plan_chunk(*chunk, window) for chunk in self._chunks]
        out = torch.empty_like(q)
        for plan in self._decode_plans[window]:
            out[plan.rows] = self._attend_decode(layer, q[plan.rows], plan)
        for chunk in self._chunk_plans[window]:
            rows = slice(chunk.start, chunk.stop)
            if chunk.kv_slots is None:
                keys, values = k[rows], v[rows]
            else:
                keys, values = self._cache.read(layer, chunk.kv_slots)
            out[rows] = attend_one(q[rows], keys, values, chunk.mask)
        return out.flatten(1)

    def _buckets(self, decode: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Group decode rows by context within a factor of two: few calls, at most half of the gathered rows padding."""
        buckets: dict[int, list[tuple[int, int]]] = {}
        for sequence, token in decode:
            blocks = -(-self._contexts[sequence] // self._cache.block_size)
            buckets.setdefault(blocks.bit_length(), []).append((sequence, token))
        return list(buckets.values())

    def _slots_of(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """KV slots of `positions` [n, S] of `sequences` [n]."""
        size = self._cache.block_size
        blocks = self._block_tables[sequences].gather(1, positions // size)
        return blocks * size + positions % size

    def _plan_decode(self, bucket: list[tuple[int, int]], window: int | None) -> _DecodePlan:
        device = self._block_tables.device
        sequences = torch.tensor([sequence for sequence, _ in bucket], device=device)
        contexts = [self._contexts[sequence] for sequence, _ in bucket]
        span = max(contexts) if window is None else min(max(contexts), window)
        # Right-aligned: column S - 1 is the newest position of every row, so one rule serves full and sliding layers.
        positions = torch.arange(-span, 0, device=device) + torch.tensor(contexts, device=device)[:, None]
        mask = None if min(contexts) >= span else (positions >= 0)[:, None, None, :]
        # Padding reads position 0, which is written, so that no undefined memory (a NaN, say) meets the softmax.
        kv_slots = self._slots_of(sequences, positions.clamp(min=0))
        tokens = [token for _, token in bucket]
        contiguous = tokens == list(range(tokens[0], tokens[-1] + 1))
        rows = slice(tokens[0], tokens[-1] + 1) if contiguous else torch.tensor(tokens, device=device)
        return _DecodePlan(rows, kv_slots, mask)

    def _plan_chunk(self, sequence: int, start: int, stop: int, window: int | None) -> _ChunkPlan:
        device = self._block_tables.device
        length, context = stop - start, self._contexts[sequence]
        first = 0 if window is None else max(0, context - length - window + 1)
        plain = window is None or context <= window
        if length == context and plain:
            return _ChunkPlan(start, stop, None, None)
        mask = causal_mask(length, context - first, window, device)
        if length == context:
            return _ChunkPlan(start, stop, None, mask)
        positions = torch.arange(first, context, device=device)[None]
        return _ChunkPlan(start, stop, self._slots_of(torch.tensor([sequence], device=device), positions)[0], mask)

    def _attend_decode(self, layer: int, q: Tensor, plan: _DecodePlan) -> Tensor:
        """q [n, Hq, D] against the n contexts of the plan; the query heads of a group are rows of one product."""
        n, heads, dim = q.shape
        keys, values = self._cache.read(layer, plan.kv_slots.view(-1))
        keys, values = (x.view(n, plan.kv_slots.shape[1], -1, dim).transpose(1, 2) for x in (keys, values))
        grouped = q.reshape(n, keys.shape[1], heads // keys.shape[1], dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=plan.mask)
        return out.reshape(n, heads, dim)


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    """One call for n decode rows: `rows` of the stream, `kv_slots` [n, S], `mask` [n, 1, 1, S] or None."""

    rows: slice | Tensor
    kv_slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    """A prefill chunk; `kv_slots` None: all its keys are in the step itself; `mask` None: plain causal."""

    start: int
    stop: int
    kv_slots: Tensor | None
    mask: Tensor | None


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence: q [L, Hq, D], k and v [S, Hkv, D], mask bool [L, S] or None for plain causal; gives [L, Hq, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def causal_mask(length: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, keys], true where a query sees a key; the queries are the last `length` of the `keys` positions."""
    query = torch.arange(keys - length, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
