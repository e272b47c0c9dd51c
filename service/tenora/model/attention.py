"""Causal attention over many sequences in one stream of tokens, with and without a cache.

`PackedAttention` is for training: sequences lie one after the other, nothing is cached, gradients flow.
`paged_attention` is for serving: keys and values go into a `KVCache` and prefill chunks and decode rows mix freely.
Both are built once per step and asked once per layer. Heads are grouped: query head h reads key head h // (Hq / Hkv).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tenora.model.cache import KVCache
from tenora.model.gathered import GatheredAttention, attend_one, causal_mask
from tenora.model.heads import Attention, HeadNorm, TorchHeads
from tenora.model.pages import DecodeAttention, SplitAttention
from tenora_kernels.cpu.attention.attention import PagedStep, Rope
from tenora_kernels.cpu.runtime.team import Team

__all__ = ["Attention", "CompiledAttention", "KVCache", "PackedAttention", "paged_attention"]


class PackedAttention(TorchHeads):
    """Block-diagonal causal attention, differentiable, without a cache.

    Sequences that begin alike need their common beginning only once: it is a sequence, or the beginning of one, and
    the others hold what comes after it. Positions (and hence RoPE) are the caller's business.

    Args:
        cu_seqlens: [B + 1] ascending from 0 to T; sequence b is tokens cu_seqlens[b] … cu_seqlens[b + 1].
        prefixes: per sequence None, or (a, n): it sees the first n tokens of sequence a before its own, where a has no
            prefix itself.

    Attributes:
        cu_seqlens, prefixes: as given; prefixes is None if no sequence has one.

    Raises:
        ValueError: a prefix is longer than its sequence, or that has one itself.
    """

    def __init__(
        self, cu_seqlens: Sequence[int] | Tensor, prefixes: Sequence[tuple[int, int] | None] | None = None
    ) -> None:
        self.cu_seqlens = _host(cu_seqlens)
        self.prefixes = list(prefixes) if prefixes is not None and any(prefixes) else None
        bounds = list(pairwise(self.cu_seqlens))
        before = self.prefixes or [None] * len(bounds)
        self._bounds: list[tuple[int, slice, slice]] = []
        for number, ((start, stop), prefix) in enumerate(zip(bounds, before, strict=True)):
            shared = slice(0, 0)
            if prefix is not None:
                owner, count = prefix
                if before[owner] is not None or count > bounds[owner][1] - bounds[owner][0]:
                    raise ValueError(f"no sequence can begin with the first {count} tokens of sequence {owner}.")
                shared = slice(bounds[owner][0], bounds[owner][0] + count)
            if stop > start:
                self._bounds.append((number, slice(start, stop), shared))
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def sequences(self) -> Iterator[tuple[int, slice, slice]]:
        """Of each sequence that has tokens its number, those, and those of another that it sees before them."""
        yield from self._bounds

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:  # noqa: ARG002  # the protocol's
        """See `Attention.attend`."""
        if not self._bounds:
            return q.flatten(1)
        rows = []
        for _, own, shared in self._bounds:
            count = shared.stop - shared.start
            keys, values = (x[own] if count == 0 else torch.cat((x[shared], x[own])) for x in (k, v))
            mask = self._mask(own.stop - own.start, count, window, q.device)
            rows.append(attend_one(q[own], keys, values, mask))
        return torch.cat(rows).flatten(1)

    def _mask(self, length: int, shared: int, window: int | None, device: torch.device) -> Tensor | None:
        """None where plain causal attention is meant; shared by all the layers."""
        if window is not None and shared + length <= window:
            window = None
        if shared == 0 and window is None:
            return None
        key = (length, shared, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(length, shared + length, window, device)
        return self._masks[key]


class CompiledAttention:
    """`PagedStep` on a cache that lies as it wants it; no gradient flows."""

    def __init__(self, cache: KVCache, step: PagedStep) -> None:
        self._cache, self._step = cache, step

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention`. The cache of `layer` is changed in place."""
        return self._step.attend(q, k, v, (self._cache.k[layer], self._cache.v[layer]), window)

    def attend_qkv(
        self,
        layer: int,
        qkv: Tensor,
        kv_heads: int,
        rope: tuple[Tensor, Tensor],
        window: int | None,
        norm: HeadNorm | None,
    ) -> Tensor:
        """See `Attention`: one call normalises, rotates, writes and attends."""
        q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        cache = (self._cache.k[layer], self._cache.v[layer])
        return self._step.attend(q, k, v, cache, window, rope=Rope(*rope), norm=weight, eps=eps)


def paged_attention(
    cache: KVCache,
    kv_slots: Tensor,
    query_start: Sequence[int] | Tensor | None,
    context_lens: Sequence[int] | Tensor,
    block_tables: Tensor,
    *,
    team: Team | None = None,
) -> Attention:
    """Attention that writes the new keys and values into the cache, then attends to all that is cached of a sequence.

    On a CPU compiled code reads the cache as it lies; on CUDA a kernel does so for rows with one new token, and flash
    attention takes the chunks; elsewhere what is cached is gathered for torch's attention.

    Args:
        cache: the blocks.
        kv_slots: int64 [T], the KV slot of each token of the step.
        query_start: [B + 1] ascending from 0 to T; sequence b's new tokens are query_start[b] … query_start[b + 1].
            None: one new token per sequence, and the host need not know more. The other arguments may then be buffers
            that a CUDA graph is captured over, with padding in them: see `DecodeAttention`.
        context_lens: [B], tokens of each sequence including the new ones; the new tokens are its last. An int32 tensor
            on the device if query_start is None.
        block_tables: int [B, max_blocks]; entries beyond a sequence's context are not read.
        team: who computes on a CPU; None is the calling thread.

    query_start and context_lens are wanted on the host: Python integers avoid a synchronisation on an accelerator.
    """
    if query_start is None:
        contexts = torch.as_tensor(context_lens, dtype=torch.int32, device=kv_slots.device)
        return DecodeAttention(cache, kv_slots, contexts, block_tables)
    starts, lengths = _host(query_start), _host(context_lens)
    if cache.panelled:
        step = PagedStep(kv_slots.numpy(), starts, lengths, block_tables.numpy(), team=team)
        return CompiledAttention(cache, step)
    kind = SplitAttention if cache.k[0].is_cuda else GatheredAttention
    return kind(cache, kv_slots, starts, lengths, block_tables)


def _host(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
