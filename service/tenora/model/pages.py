"""Paged attention on a GPU: rows with one new token read the cache in place, chunks of a prompt take flash attention.

Which way a row goes depends on its own number of new tokens, never on what else is in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tenora.model.cache import KVCache
from tenora.model.gathered import GatheredAttention
from tenora.model.heads import TorchHeads
from tenora.model.to_device import to_device
from tenora.model.varlen import VarlenAttention
from tenora_kernels import reference

__all__ = ["DecodeAttention", "SplitAttention"]


class _Kernels(Protocol):
    """What `tenora_kernels.gpu.paged` and, in plain torch, `tenora_kernels.reference` offer."""

    def write_pages(self, keys: Tensor, values: Tensor, kv_slots: Tensor, k: Tensor, v: Tensor) -> None: ...

    def attend_pages(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, window: int | None
    ) -> Tensor: ...


def _kernels_for(device: torch.device) -> _Kernels:
    if device.type != "cuda":
        return reference
    # Imported when it is needed: Triton takes a second, and a machine without a GPU may lack it.
    from tenora_kernels.gpu import paged  # noqa: PLC0415  # see above

    return paged


class DecodeAttention(TorchHeads):
    """Attention of sequences with one new token each. Reads nothing on the host: a CUDA graph may be captured over it.

    Args:
        cache: the blocks.
        kv_slots: int32 [B], the KV slot of each new token; a negative one (padding) is not written.
        contexts: int32 [B], tokens of each sequence, the new one included; 0 (padding) gives zeros.
        block_tables: int32 [B, max_blocks] with any strides; entries beyond a context are not read.
    """

    def __init__(self, cache: KVCache, kv_slots: Tensor, contexts: Tensor, block_tables: Tensor) -> None:
        self._cache = cache
        self._kv_slots, self._contexts, self._block_tables = kv_slots, contexts, block_tables
        self._kernels = _kernels_for(kv_slots.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`. The cache of `layer` is changed in place."""
        keys, values = self._cache.k[layer], self._cache.v[layer]
        self._kernels.write_pages(keys, values, self._kv_slots, k, v)
        return self._kernels.attend_pages(q, keys, values, self._block_tables, self._contexts, window)


class SplitAttention(TorchHeads):
    """A step in which some sequences have one new token and others several; arguments as those of `paged_attention`.

    The two kinds are two steps side by side: no sequence reads what another one writes in the same step.
    """

    def __init__(
        self,
        cache: KVCache,
        kv_slots: Tensor,
        query_start: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Tensor,
    ) -> None:
        self._parts: list[tuple[Tensor, GatheredAttention | VarlenAttention | DecodeAttention]] = []
        device = kv_slots.device
        counts = [stop - start for start, stop in pairwise(query_start)]
        for single in (True, False):
            chosen = [index for index, count in enumerate(counts) if (count == 1 if single else count > 1)]
            if not chosen:
                continue
            tokens = [torch.arange(query_start[index], query_start[index + 1]) for index in chosen]
            rows = to_device(torch.cat(tokens), device)
            contexts = [context_lens[index] for index in chosen]
            chosen_slots = kv_slots[rows]
            tables = block_tables[to_device(torch.tensor(chosen), device)]
            if single:
                lengths = to_device(torch.tensor(contexts, dtype=torch.int32), device)
                self._parts.append((rows, DecodeAttention(cache, chosen_slots.int(), lengths, tables.int())))
                continue
            kind = VarlenAttention if VarlenAttention.supports(cache) else GatheredAttention
            starts = [0, *torch.tensor([counts[index] for index in chosen]).cumsum(0).tolist()]
            self._parts.append((rows, kind(cache, chosen_slots, starts, contexts, tables)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`. The cache of `layer` is changed in place."""
        if len(self._parts) == 1:  # all the rows, in their order
            return self._parts[0][1].attend(layer, q, k, v, window)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for rows, part in self._parts:
            out[rows] = part.attend(layer, q[rows], k[rows], v[rows], window)
        return out
