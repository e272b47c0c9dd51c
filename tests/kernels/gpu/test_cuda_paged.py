"""Paged decode attention on a real device, at the sizes that it is made for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenora_kernels.gpu import configs, paged
from tests.kernels.cases import worst
from tests.kernels.gpu.pages import Pages

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# The weights of the softmax are rounded to the type of the values, and the result again.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(TOLERANCE)
EDGES = [0, 1, 15, 16, 17, 255, 256, 257, 1000, 8192, 8193, 20_000]


def attend(pages: Pages, window: int | None = None) -> Tensor:
    return paged.attend_pages(pages.q, pages.keys, pages.values, pages.tables, pages.contexts, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (8, 4, 256), (4, 4, 96), (32, 1, 80)])
def test_equals_torchs_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    pages = Pages.make(EDGES, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    gpu = pages.cuda()
    for window in (None, 1, 300, 4096):
        got = attend(gpu, window)
        assert worst(got.cpu(), pages.wanted(window)) <= TOLERANCE[dtype]
        assert not got[0].any(), "padding must be zeros"
        assert torch.equal(got, attend(gpu, window)), "equal arguments, other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages.make(EDGES, heads=8, kv_heads=2, dim=64, dtype=dtype).cuda()
    whole = attend(pages)
    for row in range(len(EDGES)):
        assert torch.equal(attend(pages.rows([row])), whole[[row]])
    monkeypatch.setattr(configs, "programs_per_row", lambda most, rows: 1)
    assert torch.equal(attend(pages), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_replays_with_any_contexts(dtype: torch.dtype) -> None:
    """Captured with nothing but padding."""
    pages = Pages.make(EDGES, heads=8, kv_heads=2, dim=64, dtype=dtype).cuda()
    lengths, slots = torch.zeros_like(pages.contexts), torch.full_like(pages.contexts, -1)
    new = torch.zeros(len(EDGES), 2, 64, dtype=dtype, device="cuda")

    def step() -> Tensor:
        paged.write_pages(pages.keys, pages.values, slots, new, new)
        return paged.attend_pages(pages.q, pages.keys, pages.values, pages.tables, lengths, None)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert not out.any()
    for chosen in (EDGES, EDGES[::-1], [0] * len(EDGES), [1] * len(EDGES)):
        lengths.copy_(torch.tensor([min(n, most) for n, most in zip(chosen, EDGES, strict=True)]))
        graph.replay()
        here = Pages(pages.q, pages.keys, pages.values, pages.tables, lengths)
        assert torch.equal(out, attend(here))
    slots[3] = int(pages.tables[3, 0]) * 16
    new[3] = 1
    graph.replay()
    assert (pages.keys[pages.tables[3, 0], 0] == 1).all()


def test_nothing_waits_for_the_device() -> None:
    pages = Pages.make(EDGES).cuda()
    slots = torch.full_like(pages.contexts, -1)
    attend(pages)
    paged.write_pages(pages.keys, pages.values, slots, pages.q[:, :1], pages.q[:, :1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(pages)
        paged.write_pages(pages.keys, pages.values, slots, pages.q[:, :1], pages.q[:, :1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
