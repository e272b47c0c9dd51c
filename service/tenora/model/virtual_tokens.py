"""Virtual tokens: keys and values at the head of a sequence that belong to no token of the vocabulary.

They fill positions 0 to P - 1, so the first real token is at position P, and everything that reads the cache takes them
for tokens like others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenora.model.attention import paged_attention
from tenora.model.cache import KVCache
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.to_device import to_device

__all__ = ["compute_virtual_tokens", "write_virtual_tokens"]


def write_virtual_tokens(cache: KVCache, rows: Sequence[Tensor], start: int, blocks: Sequence[int]) -> None:
    """Prefix tuning (Li and Liang 2021): write learned keys, which are not rotated, and values into the cache.

    Args:
        cache: changed in place.
        rows: per layer [P, 2 · kv], keys and then values of each virtual token.
        start: the first position to write; those up to P follow.
        blocks: block table that holds positions 0 to P - 1.
    """
    kv_slots = to_device(_kv_slots(cache, start, len(rows[0]), blocks), cache.k[0].device)
    for layer, values in enumerate(rows):
        shape = (len(kv_slots), *cache.k[layer].shape[2:])
        k, v = (part.to(cache.k[layer].dtype).reshape(shape) for part in values[start:].chunk(2, dim=1))
        cache.write(layer, kv_slots, k, v)


@torch.no_grad()
def compute_virtual_tokens(
    decoder: Decoder, cache: KVCache, embeddings: Tensor, start: int, blocks: Sequence[int], *, most: int
) -> None:
    """Prompt tuning (Lester et al. 2021): run learned embeddings through the base, which fills the cache.

    Args:
        decoder: the base.
        cache: changed in place.
        embeddings: [P, H].
        start: the first position to compute; those before it lie in the cache.
        blocks: block table that holds positions 0 to P - 1.
        most: tokens of one pass.
    """
    device, table = decoder.device, torch.tensor([list(blocks)], dtype=torch.int32)
    for first in range(start, len(embeddings), most):
        stop = min(first + most, len(embeddings))
        positions = to_device(torch.arange(first, stop), device)
        kv_slots = to_device(_kv_slots(cache, first, stop, blocks), device)
        attention = paged_attention(
            cache, kv_slots, [0, stop - first], [stop], to_device(table, device), team=decoder.team
        )
        context = ForwardContext(positions, decoder.rope(positions), attention)
        hidden = embeddings[first:stop].to(decoder.dtype)
        for layer in decoder.layers:
            hidden = layer(hidden, context)


def _kv_slots(cache: KVCache, start: int, stop: int, blocks: Sequence[int]) -> Tensor:
    """int64 [stop - start], where positions [start, stop) lie."""
    positions = torch.arange(start, stop)
    return torch.tensor(blocks)[positions // cache.block_size] * cache.block_size + positions % cache.block_size
