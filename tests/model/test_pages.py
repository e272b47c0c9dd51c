"""The ways of a GPU, without one: rows with one new token and chunks of prompts, apart and in one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tenora.model import pages, varlen
from tenora.model.attention import paged_attention
from tenora.model.cache import KVCache
from tenora.model.decoder import RMSNorm
from tenora.model.gathered import GatheredAttention
from tenora.model.pages import DecodeAttention, SplitAttention
from tenora.model.varlen import VarlenAttention
from tests.model.test_attention_paths import CONTEXTS, COUNTS, HEADS, KV_HEADS, Step, flash_in_torch

SINGLE = [index for index, count in enumerate(COUNTS) if count == 1]


def split(step: Step) -> SplitAttention:
    return SplitAttention(step.cache, step.slots, step.starts, CONTEXTS, step.tables)


def caches(step: Step) -> list[Tensor]:
    return [part.nan_to_num(nan=9.0) for part in (*step.cache.k, *step.cache.v)]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_a_mixed_step_equals_the_gathered_one(window: int | None, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(varlen, "varlen_attn", flash_in_torch(calls))
    monkeypatch.setattr(VarlenAttention, "supports", staticmethod(lambda cache: flash))
    mixed, gathered = Step(), Step()
    actual = split(mixed).attend(1, *mixed.split, window)
    expected = gathered.gathered().attend(1, *gathered.split, window)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
    assert all(torch.equal(one, other) for one, other in zip(caches(mixed), caches(gathered), strict=True))
    assert len(calls) == flash, "the chunk alone takes flash attention"


def test_a_row_does_not_depend_on_what_is_beside_it() -> None:
    """To the bit: alone, without the chunk, and with all the others."""
    whole = Step()
    out = split(whole).attend(1, *whole.split, 7)
    tokens = [whole.starts[index] for index in SINGLE]
    step = Step()
    rows = DecodeAttention(
        step.cache, step.slots[tokens], torch.tensor(CONTEXTS, dtype=torch.int32)[SINGLE], step.tables[SINGLE]
    )
    assert torch.equal(rows.attend(1, *(x[tokens] for x in step.split), 7), out[tokens])
    for index, token in zip(SINGLE, tokens, strict=True):
        step = Step()
        alone = SplitAttention(
            step.cache, step.slots[token : token + 1], [0, 1], CONTEXTS[index : index + 1], step.tables[index][None]
        )
        assert torch.equal(alone.attend(1, *(x[token : token + 1] for x in step.split), 7)[0], out[token])
    step = Step()
    first, last = step.starts[2], step.starts[3]
    chunk = SplitAttention(
        step.cache, step.slots[first:last], [0, last - first], CONTEXTS[2:3], step.tables[2:3]
    ).attend(1, *(x[first:last] for x in step.split), 7)
    assert torch.equal(chunk, out[first:last])


def test_padding_is_zero_and_stored_nowhere() -> None:
    step = Step()
    tokens = [step.starts[index] for index in SINGLE]
    lengths = torch.tensor([0, *(CONTEXTS[index] for index in SINGLE), 0], dtype=torch.int32)
    slots = torch.tensor([-1, *step.slots[tokens].tolist(), -1], dtype=torch.int32)
    tables = torch.full((len(slots), 12), 10_000, dtype=torch.int32)
    tables[1:-1] = step.tables[SINGLE]
    padded = [torch.cat((x[:1], x[tokens], x[:1])) for x in step.split]
    before = caches(step)
    out = paged_attention(step.cache, slots, None, lengths, tables).attend(1, *padded, None)
    assert not out[[0, -1]].any()
    gathered = Step()
    expected = gathered.gathered().attend(1, *gathered.split, None)
    torch.testing.assert_close(out[1:-1], expected[tokens], atol=2e-6, rtol=0)
    changed = {int((one != other).any(-1).any(-1).sum()) for one, other in zip(before, caches(step), strict=True)}
    assert changed == {0, len(SINGLE)}, "the new tokens in the layer asked, nothing elsewhere"


@torch.no_grad()
def test_from_the_fused_projection() -> None:
    fused, gathered = Step(), Step()
    tokens = [fused.starts[index] for index in SINGLE]
    attention = paged_attention(
        fused.cache,
        fused.slots[tokens],
        None,
        torch.tensor(CONTEXTS, dtype=torch.int32)[SINGLE],
        fused.tables[SINGLE],
    )
    cos, sin = (table[tokens] for table in fused.rope)
    norm = RMSNorm((HEADS + KV_HEADS, 8), 1e-5)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    out = attention.attend_qkv(1, fused.heads[tokens], KV_HEADS, (cos, sin), None, norm)
    expected = gathered.paged().attend_qkv(1, gathered.heads, KV_HEADS, gathered.rope, None, norm)
    torch.testing.assert_close(out, expected[tokens], atol=2e-6, rtol=0)


class OnCard(Tensor):
    """Says that it lies on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_what_lies_on_a_gpu_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step()
    made: list[type] = []
    for kind in (SplitAttention, GatheredAttention):
        build = kind.__init__

        def noted(self: Any, *given: Any, build: Any = build, kind: type = kind) -> None:
            made.append(kind)
            build(self, *given)

        monkeypatch.setattr(kind, "__init__", noted)
    plain = KVCache(*(tuple(x.contiguous().as_subclass(OnCard) for x in part) for part in (step.cache.k, step.cache.v)))
    attention = paged_attention(plain, step.slots, step.starts, CONTEXTS, step.tables)
    attention.attend(1, *step.split, None)
    attention.attend(0, *step.split, None)
    assert made == [SplitAttention, GatheredAttention], "once per step; the second one is the chunk's"


def test_triton_is_for_cards() -> None:
    from tenora_kernels import reference

    assert pages._kernels_for(torch.device("cpu")) is reference


@pytest.mark.parametrize("takes_gqa", [True, False])
def test_flash_attention_is_called_as_this_torch_has_it(takes_gqa: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no `enable_gqa`, and needs none."""
    from torch.nn.attention import varlen as torchs

    called: list[dict[str, Any]] = []

    def newer(q: Tensor, *, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:
        called.append({"enable_gqa": enable_gqa})
        return q

    def older(q: Tensor, *, window_size: tuple[int, int]) -> Tensor:
        called.append({})
        return q

    monkeypatch.setattr(torchs, "varlen_attn", newer if takes_gqa else older)
    varlen.varlen_attn(torch.zeros(1), window_size=(-1, 0), enable_gqa=True)
    assert called == [{"enable_gqa": True} if takes_gqa else {}]
