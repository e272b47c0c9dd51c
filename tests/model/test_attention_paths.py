"""The ways of paged attention (compiled, gathered, flash) give the same, and each is taken where it should be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tenora.model import varlen
from tenora.model.attention import Attention, CompiledAttention, KVCache, paged_attention
from tenora.model.decoder import RMSNorm
from tenora.model.gathered import GatheredAttention, attend_one, causal_mask
from tenora.model.rotary import rotate
from tenora.model.spec import ModelSpec
from tenora.model.varlen import VarlenAttention

HEADS, KV_HEADS = 6, 2
CONTEXTS, COUNTS, SIZE = [23, 2, 41, 40, 3, 1], [1, 1, 16, 1, 1, 1], 4


def spec(dim: int) -> ModelSpec:
    return ModelSpec.from_config(
        {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": dim,
        }
    )


class Step:
    """One step over sequences that are partly cached; built anew for each way, with the same numbers."""

    def __init__(self, dim: int = 8, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.cache = KVCache.allocate(spec(dim), 60, SIZE, dtype=dtype)
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(float("nan"))
        order = torch.randperm(60, generator=generator)
        self.tables = torch.full((6, 12), 10_000, dtype=torch.int32)
        slots, used = [], 0
        for sequence, (context, count) in enumerate(zip(CONTEXTS, COUNTS, strict=True)):
            blocks = -(-context // SIZE)
            self.tables[sequence, :blocks] = order[used : used + blocks]
            used += blocks
            at = torch.arange(context)
            where = self.tables[sequence][at // SIZE].long() * SIZE + at % SIZE
            k, v = (torch.randn(context, KV_HEADS, dim, generator=generator).to(dtype) for _ in range(2))
            self.cache.write(1, where[: context - count], k[: context - count], v[: context - count])
            slots.append(where[context - count :])
        self.slots = torch.cat(slots)
        self.starts = [0, *torch.tensor(COUNTS).cumsum(0).tolist()]
        self.qkv = torch.randn(self.starts[-1], (HEADS + 2 * KV_HEADS) * dim, generator=generator).to(dtype)
        angles = torch.rand(self.starts[-1], dim, generator=generator) * 6
        self.rope = angles.cos().to(dtype), angles.sin().to(dtype)
        self.heads = self.qkv.view(-1, HEADS + 2 * KV_HEADS, dim)

    @property
    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = torch.split(self.heads, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        return q, k, v

    def paged(self) -> Attention:
        return paged_attention(self.cache, self.slots, self.starts, CONTEXTS, self.tables)

    def gathered(self) -> GatheredAttention:
        return GatheredAttention(self.cache, self.slots, self.starts, CONTEXTS, self.tables)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_compiled_equals_gathered(window: int | None) -> None:
    compiled, gathered = Step(), Step()
    attention = compiled.paged()
    assert isinstance(attention, CompiledAttention)
    actual = attention.attend(1, *compiled.split, window)
    expected = gathered.gathered().attend(1, *gathered.split, window)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
    for one, other in zip((*compiled.cache.k, *compiled.cache.v), (*gathered.cache.k, *gathered.cache.v), strict=True):
        assert torch.equal(one.nan_to_num(nan=9.0), other.nan_to_num(nan=9.0))  # nothing but the step's slots changed


@pytest.mark.parametrize("dim", [8, 12])
@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_attend_qkv_equals_the_modules(dim: int, normed: bool) -> None:
    """Heads of 12 are nothing for the compiled code: the other path has to do the same."""
    fused, modules = Step(dim), Step(dim)
    attention = fused.paged()
    assert isinstance(attention, CompiledAttention) == (dim == 8)
    norm = RMSNorm((HEADS + KV_HEADS, dim), 1e-5)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    before = fused.qkv.clone()
    actual = attention.attend_qkv(1, fused.heads, KV_HEADS, fused.rope, 9, norm if normed else None)
    assert torch.equal(fused.qkv, before)
    qk, v = torch.split(modules.heads, [HEADS + KV_HEADS, KV_HEADS], dim=1)
    q, k = torch.split(rotate(norm(qk) if normed else qk, *modules.rope), [HEADS, KV_HEADS], dim=1)
    expected = modules.gathered().attend(1, q, k, v, 9)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_a_type_that_the_compiled_code_lacks() -> None:
    half, single = Step(dtype=torch.float16), Step()
    attention = half.paged()
    assert isinstance(attention, GatheredAttention)
    out = attention.attend(1, *half.split, None)
    torch.testing.assert_close(out.float(), single.paged().attend(1, *single.split, None), atol=5e-3, rtol=0)


def flash_in_torch(calls: list[dict[str, Any]]) -> Callable[..., Tensor]:
    """`varlen_attn` as its documentation describes it, sequence after sequence."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa, **more):  # type: ignore[no-untyped-def]
        calls.append(more)
        assert enable_gqa
        assert window_size[1] == 0
        rows, starts = [], cu_seq_q.tolist()
        for sequence, (start, stop) in enumerate(pairwise(starts)):
            if more:
                used = int(more["seqused_k"][sequence])
                blocks = more["block_table"][sequence][: -(-used // k.shape[1])].long()
                keys, values = (cached[blocks].flatten(0, 1)[:used] for cached in (k, v))
            else:
                keys, values = (x[cu_seq_k[sequence] : cu_seq_k[sequence + 1]] for x in (k, v))
            assert stop - start <= max_q
            assert len(keys) <= max_k
            window = None if window_size[0] < 0 else window_size[0] + 1
            rows.append(attend_one(q[start:stop], keys, values, causal_mask(stop - start, len(keys), window, q.device)))
        return torch.cat(rows)

    return varlen_attn


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("implementation", [None, "FA3"])
def test_flash_gets_what_it_needs(
    implementation: str | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(varlen, "varlen_attn", flash_in_torch(calls))
    monkeypatch.setattr(varlen.flash, "current_flash_attention_impl", lambda: implementation)
    step, gathered = Step(), Step()
    actual = VarlenAttention(step.cache, step.slots, step.starts, CONTEXTS, step.tables)
    out = actual.attend(1, *step.split, window)
    expected = gathered.gathered().attend(1, *gathered.split, window)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    if implementation is None:
        assert calls == [{}]
    else:
        assert calls[0]["num_splits"] == 1


def test_flash_is_for_cards() -> None:
    assert not VarlenAttention.supports(Step().cache)


def test_flash_takes_two_bytes_and_whole_groups_of_eight_columns() -> None:
    assert all(varlen.supports(torch.bfloat16, dim) for dim in (8, 64, 72, 96, 128, 256))
    assert not any(varlen.supports(torch.bfloat16, dim) for dim in (4, 100, 260, 264, 320))
    assert varlen.supports(torch.float16, 128)
    assert not varlen.supports(torch.float32, 128)


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(("major", "installed"), [(9, True), (9, False), (8, True), (10, True)])
def test_flash_attention_3_is_taken_where_there_are_a_card_and_a_package_for_it(
    major: int, installed: bool, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a package that does not load is no reason not to start."""
    active: list[str] = []

    def take(name: str) -> None:
        if not works:
            raise ImportError("undefined symbol")
        active.append(name)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(varlen.importlib.util, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(varlen.flash, "activate_flash_attention_impl", take)
    monkeypatch.setattr(varlen.flash, "current_flash_attention_impl", lambda: active[0] if active else None)
    wanted = "FA3" if major == 9 and installed and works else "FA2"
    assert varlen.activate(torch.device("cuda")) == wanted
    assert varlen.activate(torch.device("cpu")) == wanted, "a CPU changes nothing"
