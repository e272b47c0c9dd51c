"""Causal attention over many sequences in one stream of tokens, with and without a cache.

`PackedAttention` is for training: sequences lie one after the other, nothing is cached, gradients flow.
`PagedAttention` is for serving: keys and values go into a `KVCache` and prefill chunks and decode rows mix freely.
Both are built once per step and asked once per layer. Heads are grouped: query head h reads key head h // (Hq / Hkv).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tenora.model.cache import KVCache
from tenora.model.gathered import GatheredAttention, attend_one, causal_mask
from tenora.model.pages import DecodeAttention, SplitAttention
from tenora.model.rotary import rotate
from tenora_kernels.cpu.attention.attention import PagedStep, Rope
from tenora_kernels.cpu.runtime.team import Team

__all__ = ["Attention", "KVCache", "PackedAttention", "PagedAttention"]


class Attention(Protocol):
    """What a decoder layer asks for."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attend from every token to its own sequence, up to itself.

        Args:
            layer: index of the layer, for implementations that keep state per layer.
            q: [T, Hq, D], rotated; k, v: [T, Hkv, D], k rotated.
            window: how many positions a token sees, itself included; None is all.

        Returns:
            [T, Hq · D].
        """
        ...


class PackedAttention:
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
        self._bounds: list[tuple[slice, slice]] = []
        for (start, stop), prefix in zip(bounds, before, strict=True):
            shared = slice(0, 0)
            if prefix is not None:
                owner, count = prefix
                if before[owner] is not None or count > bounds[owner][1] - bounds[owner][0]:
                    raise ValueError(f"no sequence can begin with the first {count} tokens of sequence {owner}.")
                shared = slice(bounds[owner][0], bounds[owner][0] + count)
            if stop > start:
                self._bounds.append((slice(start, stop), shared))
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:  # noqa: ARG002  # the protocol's
        """See `Attention.attend`."""
        if not self._bounds:
            return q.flatten(1)
        rows = []
        for own, shared in self._bounds:
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


class PagedAttention:
    """Writes the new keys and values into the cache, then attends to everything cached of each sequence.

    On a CPU compiled code reads the cache as it lies; on CUDA a kernel does so for rows with one new token, and flash
    attention takes the chunks; anything else (and whatever needs a gradient) gathers what is cached and takes torch's
    attention.

    Args:
        cache: the blocks.
        slot_mapping: int64 [T], the cache slot of each token of the step.
        query_start: [B + 1] ascending from 0 to T; sequence b's new tokens are query_start[b] … query_start[b + 1].
            None: one new token per sequence, and the host need not know more. The other arguments may then be buffers
            that a CUDA graph is captured over, with padding in them: see `DecodeAttention`.
        context_lens: [B], tokens of each sequence including the new ones; the new tokens are its last. An int32 tensor
            on the device if query_start is None.
        block_tables: int [B, max_blocks]; entries beyond a sequence's context are not read.
        team: who computes on a CPU; None is the calling thread.

    query_start and context_lens are wanted on the host: Python integers avoid a synchronisation on an accelerator.

    Attributes:
        step: the step for `tenora_kernels.cpu`; None where the compiled code does not take the cache.
    """

    def __init__(
        self,
        cache: KVCache,
        slot_mapping: Tensor,
        query_start: Sequence[int] | Tensor | None,
        context_lens: Sequence[int] | Tensor,
        block_tables: Tensor,
        *,
        team: Team | None = None,
    ) -> None:
        self._cache = cache
        self._elsewhere: Attention | None = None
        self.step: PagedStep | None = None
        if query_start is None:
            contexts = torch.as_tensor(context_lens, dtype=torch.int32, device=slot_mapping.device)
            self._elsewhere = DecodeAttention(cache, slot_mapping, contexts, block_tables)
            query_start = range(len(contexts) + 1)
        elif cache.panelled:
            starts, lengths = _host(query_start), _host(context_lens)
            self.step = PagedStep(slot_mapping.numpy(), starts, lengths, block_tables.numpy(), team=team)
        self._inputs = (slot_mapping, query_start, context_lens, block_tables)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`. The cache of `layer` is changed in place."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return self._made(GatheredAttention).attend(layer, q, k, v, window)
        if self.step is None:
            return self._serving.attend(layer, q, k, v, window)
        return self.step.attend(q, k, v, (self._cache.k[layer], self._cache.v[layer]), window)

    def attend_qkv(
        self,
        layer: int,
        qkv: Tensor,
        rope: tuple[Tensor, Tensor],
        window: int | None,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """`attend` straight from the fused projection, for serving: no gradient flows.

        Args:
            layer: index of the layer.
            qkv: [T, (Hq + 2 Hkv) · D], neither normalised nor rotated; not changed.
            rope: cos and sin [T, D], contiguous, in the type of qkv.
            window: see `Attention.attend`.
            norm: [Hq + Hkv, D], weights of the RMSNorm of each head of q and k; None if the model has none.
            eps: of that norm.

        Returns:
            [T, Hq · D].
        """
        kv_heads, dim = self._cache.k[layer].shape[2:]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        rows = qkv.view(-1, heads + 2 * kv_heads, dim)
        if self.step is not None:
            q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], dim=1)
            cache = (self._cache.k[layer], self._cache.v[layer])
            return self.step.attend(q, k, v, cache, window, rope=Rope(*rope), norm=norm, eps=eps)
        qk, v = torch.split(rows, [heads + kv_heads, kv_heads], dim=1)
        if norm is not None:
            wide = qk.float()
            qk = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(qk.dtype) * norm
        q, k = torch.split(rotate(qk, *rope), [heads, kv_heads], dim=1)
        return self._serving.attend(layer, q, k, v, window)

    @property
    def caches(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of every layer."""
        return self._cache.k, self._cache.v

    @property
    def _serving(self) -> Attention:
        """The step where the compiled code of the CPU does not take it; made when it is first needed."""
        if self._elsewhere is None:
            self._elsewhere = self._made(SplitAttention if self._cache.k[0].is_cuda else GatheredAttention)
        return self._elsewhere

    def _made(self, kind: type[SplitAttention] | type[GatheredAttention]) -> Attention:
        slots, starts, lengths, tables = self._inputs
        return kind(self._cache, slots, _host(starts), _host(lengths), tables)


def _host(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
