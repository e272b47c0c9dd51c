"""Paged decode attention in Triton's interpreter: against torch's attention in float64, on tiny shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tenora_kernels import reference
from tenora_kernels.gpu import configs, paged
from tests.kernels.cases import worst
from tests.kernels.gpu.pages import Pages
from tests.support.full import full, full_but

# The weights are rounded to the type of the values, as flash attention does; the interpreter truncates them.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = full_but(torch.bfloat16, TOLERANCE)
# Padding, one key, edges of blocks (16) and of splits (32), several splits, and more keys than eight splits of 32 hold.
EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 100, 300]


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SPLIT_KEYS", 32)
    monkeypatch.setattr(configs, "MAX_SPLITS", 8)
    tiles = configs.paged_tiles
    monkeypatch.setattr(configs, "paged_tiles", lambda *given: dataclasses.replace(tiles(*given), bn=16))
    monkeypatch.setattr(configs, "programs_per_row", lambda most, rows: min(most, 2))


def attend(pages: Pages, window: int | None = None) -> Tensor:
    return paged.attend_pages(pages.q, pages.keys, pages.values, pages.tables, pages.contexts, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", full_but([None, 33], [None, 1, 33, 1000]))
def test_contexts_at_every_edge(window: int | None, dtype: torch.dtype) -> None:
    pages = Pages.make(EDGES, dtype=dtype)
    got = attend(pages, window)
    assert got.dtype == dtype
    assert worst(got, pages.wanted(window)) <= TOLERANCE[dtype]
    assert not got[0].any(), "padding must be zeros"


@pytest.mark.parametrize(("heads", "kv_heads"), [full(1, 1), (3, 1), (8, 2), full(8, 1), full(34, 2)])
@pytest.mark.parametrize("dim", full_but(12, [12, 64, 80]))
def test_groups_and_heads(heads: int, kv_heads: int, dim: int) -> None:
    pages = Pages.make([0, 5, 70], heads=heads, kv_heads=kv_heads, dim=dim)
    assert worst(attend(pages), pages.wanted(None)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", full_but(5, [1, 5, 64]))
def test_block_sizes(block_size: int) -> None:
    pages = Pages.make([70, 3, 64], block_size=block_size)
    for window in (None, 40):
        assert worst(attend(pages, window), pages.wanted(window)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other batches, in wider tables and tables of other strides, with other numbers of programs."""
    pages = Pages.make([17, 300, 33, 100], dtype=dtype)
    whole = attend(pages, 290)
    assert torch.equal(whole, attend(pages, 290)), "equal arguments, other bits"
    for order in ([2, 0, 3, 1], [1], [0, 0]):
        assert torch.equal(attend(pages.rows(order), 290), whole[order])
    other = Pages(pages.q, pages.keys, pages.values, torch.full((40, 4), 2**30, dtype=torch.int32), pages.contexts)
    other.tables[: pages.tables.shape[1]] = pages.tables.t()
    other.tables = other.tables.t()
    for programs in (1, 3, 8):
        monkeypatch.setattr(configs, "programs_per_row", lambda most, rows, count=programs: min(most, count))
        assert torch.equal(attend(other, 290), whole)


def test_slices_of_a_fused_projection() -> None:
    pages = Pages.make([20, 40], heads=4, kv_heads=2)
    wide = torch.full((2, 8, 16), float("nan"))
    wide[:, :4] = pages.q
    plain = attend(pages)
    pages.q = wide[:, :4]
    assert torch.equal(attend(pages), plain)
    scattered = torch.full((2, 4, 32), float("nan"))
    scattered[:, :, ::2] = wide[:, :4]
    pages.q = scattered[:, :, ::2]
    assert torch.equal(attend(pages), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mutations_exceed_the_tolerance(dtype: torch.dtype) -> None:
    pages = Pages.make([40, 100], dtype=dtype)
    wanted, limit = pages.wanted(35), 2 * TOLERANCE[dtype]

    def error() -> float:
        return worst(attend(pages, 35).nan_to_num(9.0), wanted)

    assert worst(attend(pages, 34), wanted) > limit, "a window of one key less went unseen"
    assert worst(attend(pages, 36), wanted) > limit, "a window of one key more went unseen"
    pages.contexts[1] = 99
    assert error() > limit, "a missing key went unseen"
    pages.contexts[1] = 101
    assert error() > limit, "a key too many went unseen"
    pages.contexts[1] = 100
    pages.tables[1, [5, 6]] = pages.tables[1, [6, 5]]
    pages.q[1] *= 1.25
    assert error() > limit, "a wrong scale went unseen"


def test_what_does_not_fit_is_refused() -> None:
    pages = Pages.make([3])
    with pytest.raises(TypeError, match="no GPU kernel for q in"):
        paged.attend_pages(pages.q.double(), pages.keys, pages.values, pages.tables, pages.contexts, None)
    with pytest.raises(TypeError, match="a cache in"):
        paged.attend_pages(pages.q, pages.keys.bfloat16(), pages.values, pages.tables, pages.contexts, None)


@pytest.mark.parametrize("write", [paged.write_pages, reference.write_pages], ids=["kernel", "reference"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_padding_writes_nothing(write: Callable[..., None], kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.zeros(3, 5, 4, 3, 12)
    keys, values = whole[1:]  # what lies before them is where a slot of -1 would be
    qkv = torch.randn(4, 9, 12, generator=generator)
    k, v = qkv[:, 3:6], qkv[:, 6:]
    write(keys, values, torch.tensor([7, -1, 19, 0], dtype=kind), k, v)
    for cache, new in ((keys, k), (values, v)):
        rows = cache.flatten(0, 1)
        assert torch.equal(rows[[7, 19, 0]], new[[0, 2, 3]])
        rows[[7, 19, 0]] = 0
    assert not whole.any()


@pytest.mark.parametrize("window", [None, 1, 33])
def test_the_specification_is_torchs_attention(window: int | None) -> None:
    pages = Pages.make(EDGES, heads=6, kv_heads=2, dtype=torch.float64)
    got = reference.attend_pages(pages.q, pages.keys, pages.values, pages.tables, pages.contexts, window)
    assert worst(got, pages.wanted(window)) <= 1e-12


def test_no_rows() -> None:
    pages = Pages.make([3]).rows([])
    assert attend(pages).shape == (0, 32)
    paged.write_pages(pages.keys, pages.values, torch.zeros(0, dtype=torch.int32), pages.q[:, :1], pages.q[:, :1])
