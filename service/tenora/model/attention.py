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
from tenora.model.rotary import rotate
from tenora.model.varlen import VarlenAttention
from tenora_kernels.cpu.attention import PagedStep, Rope
from tenora_kernels.cpu.team import Team

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

    Args:
        cu_seqlens: [B + 1] ascending from 0 to T; sequence b is tokens cu_seqlens[b] … cu_seqlens[b + 1].
    """

    def __init__(self, cu_seqlens: Sequence[int] | Tensor) -> None:
        ends = _host(cu_seqlens)
        self._bounds = [(start, stop) for start, stop in pairwise(ends) if stop > start]
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:  # noqa: ARG002  # the protocol's
        """See `Attention.attend`."""
        if not self._bounds:
            return q.flatten(1)
        rows = []
        for start, stop in self._bounds:
            mask = self._mask(stop - start, window, q.device)
            rows.append(attend_one(q[start:stop], k[start:stop], v[start:stop], mask))
        return torch.cat(rows).flatten(1)

    def _mask(self, length: int, window: int | None, device: torch.device) -> Tensor | None:
        """None where plain causal attention is meant; shared by all the layers."""
        if window is None or length <= window:
            return None
        if (length, window) not in self._masks:
            self._masks[length, window] = causal_mask(length, length, window, device)
        return self._masks[length, window]


class PagedAttention:
    """Writes the new keys and values into the cache, then attends to everything cached of each sequence.

    On a CPU compiled code reads the cache as it lies; on CUDA one call of flash attention takes the whole step;
    anything else (and whatever needs a gradient) gathers what is cached and takes torch's attention.

    Args:
        cache: the blocks.
        slot_mapping: int64 [T], the cache slot of each token of the step.
        query_start: [B + 1] ascending from 0 to T; sequence b's new tokens are query_start[b] … query_start[b + 1].
        context_lens: [B], tokens of each sequence including the new ones; the new tokens are its last.
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
        query_start: Sequence[int] | Tensor,
        context_lens: Sequence[int] | Tensor,
        block_tables: Tensor,
        *,
        team: Team | None = None,
    ) -> None:
        self._cache = cache
        self._inputs = (slot_mapping, _host(query_start), _host(context_lens), block_tables)
        self._elsewhere: GatheredAttention | VarlenAttention | None = None
        self.step: PagedStep | None = None
        if cache.panelled:
            slots, starts, contexts, tables = self._inputs
            self.step = PagedStep(slots.numpy(), starts, contexts, tables.numpy(), team=team)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`. The cache of `layer` is changed in place."""
        if self.step is None or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return self._torch.attend(layer, q, k, v, window)
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
        return self._torch.attend(layer, q, k, v, window)

    @property
    def caches(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of every layer."""
        return self._cache.k, self._cache.v

    @property
    def _torch(self) -> GatheredAttention | VarlenAttention:
        """The step in torch; made when it is first needed."""
        if self._elsewhere is None:
            kind = VarlenAttention if VarlenAttention.takes(self._cache) else GatheredAttention
            self._elsewhere = kind(self._cache, *self._inputs)
        return self._elsewhere


def _host(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
