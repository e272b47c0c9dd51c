from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tenora.model.attention import KVCache, PackedAttention, paged_attention
from tenora.model.spec import ModelSpec
from tests.support.full import full_but

HEADS, KV_HEADS, DIM = 6, 2, 8


def spec(**overrides: object) -> ModelSpec:
    return ModelSpec.from_config(
        {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": DIM,
            **overrides,
        }
    )


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence in float64, a loop over tokens and heads: the specification."""
    rows = []
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = k[first : t + 1, group].double() @ q[t, head].double() / DIM**0.5
            heads.append(scores.softmax(0) @ v[first : t + 1, group].double())
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def qkv(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(length, HEADS, DIM, generator=generator) * 2
    k, v = (torch.randn(length, KV_HEADS, DIM, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_packed_equals_the_naive_loop_per_sequence(window: int | None) -> None:
    q, k, v = qkv(20, 1)
    for cu_seqlens in ([0, 20], [0, 1, 9, 9, 20], torch.tensor([0, 13, 20])):
        bounds = torch.as_tensor(cu_seqlens).tolist()
        out = PackedAttention(cu_seqlens).attend(0, q, k, v, window)
        expected = [naive(q[a:b], k[a:b], v[a:b], window) for a, b in pairwise(bounds) if b > a]
        torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", full_but(2, [None, 2]))
def test_packed_gradients(window: int | None) -> None:
    inputs = [x.double().requires_grad_() for x in qkv(5, 2)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return PackedAttention([0, 2, 5]).attend(0, q, k, v, window)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_paged_decode_rows_of_many_lengths_with_a_chunk_in_between(window: int | None) -> None:
    contexts, counts, size = [23, 2, 11, 40, 3, 1], [1, 1, 6, 1, 1, 1], 4
    sequences = [qkv(context, 10 + index) for index, context in enumerate(contexts)]
    cache = KVCache.allocate(spec(), 40, size)
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(float("nan"))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    tables, slots, used = torch.full((6, 10), -7, dtype=torch.int32), [], 0
    for index, context in enumerate(contexts):
        blocks = -(-context // size)
        tables[index, :blocks] = order[used : used + blocks]
        used += blocks
        positions = torch.arange(context)
        slots.append(tables[index][positions // size].long() * size + positions % size)
        old = context - counts[index]
        cache.write(1, slots[-1][:old], *(x[:old] for x in sequences[index][1:]))
    new_slots = torch.cat([slot[-count:] for slot, count in zip(slots, counts, strict=True)])
    starts = torch.tensor([0, *counts]).cumsum(0)
    q, k, v = (
        torch.cat([sequence[part][-count:] for sequence, count in zip(sequences, counts, strict=True)])
        for part in range(3)
    )
    attention = paged_attention(cache, new_slots, starts, torch.tensor(contexts), tables)
    out = attention.attend(1, q, k, v, window)
    expected = [naive(*sequence, window)[-count:] for sequence, count in zip(sequences, counts, strict=True)]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=0)
    assert torch.isnan(cache.k[0]).all()  # the other layer is untouched


def test_rows_are_independent_of_the_rest_of_the_batch() -> None:
    """A decode row whose slots lie in one bucket with longer ones reads no padding."""
    cache = KVCache.allocate(spec(), 8, 4)
    tables = torch.tensor([[5, 1, 3], [2, 7, 0]], dtype=torch.int32)
    sequences = [qkv(9, 20), qkv(12, 21)]
    slots = [table.long().repeat_interleave(4) * 4 + torch.arange(4).repeat(3) for table in tables]
    for (_, k, v), slot in zip(sequences, slots, strict=True):
        cache.write(0, slot[: len(k)], k, v)
    last = [tuple(x[-1:] for x in sequence) for sequence in sequences]
    mapping = torch.stack([slots[0][8], slots[1][11]])
    both = paged_attention(cache, mapping, [0, 1, 2], [9, 12], tables).attend(
        0, *(torch.cat(pair) for pair in zip(*last, strict=True)), None
    )
    alone = paged_attention(cache, mapping[:1], [0, 1], [9], tables[:1]).attend(0, *last[0], None)
    torch.testing.assert_close(both[:1], alone, atol=1e-6, rtol=0)


def test_bytes_per_block() -> None:
    cache = KVCache.allocate(spec(), 3, 16, dtype=torch.bfloat16)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.k, *cache.v))
    assert KVCache.bytes_per_block(spec(), 16, torch.bfloat16) * 3 == stored
    assert (cache.num_blocks, cache.block_size) == (3, 16)
