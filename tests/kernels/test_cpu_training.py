"""What the compiled training layers are made of, each against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from tenora_kernels.cpu.decoder.activation import ACTIVATIONS
from tenora_kernels.cpu.decoder.stream import lay_out_rows, lay_out_sequences
from tenora_kernels.cpu.products import rowwise, strided, transposed
from tenora_kernels.cpu.products.gemm import BF16_PANELS, FLOAT32_PANELS, PANEL, PackedMatrix
from tenora_kernels.cpu.products.strided import ADD, SET, WIDTH, times_address
from tenora_kernels.cpu.runtime.vectors import LANES
from tenora_kernels.cpu.runtime.workspace import Workspace, cut
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

EPSILON = np.float32(1e-6)


def callable_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that only kernels call, with an entry for Python."""

    @njit(nogil=True)  # type: ignore[untyped-decorator]  # numba
    def call(*arguments: Any) -> Any:
        return kernel(*arguments)

    called: Callable[..., Any] = call
    return called


gate_forward, gate_backward = callable_kernel(rowwise.gate_forward), callable_kernel(rowwise.gate_backward)
norm_forward, norm_backward = callable_kernel(rowwise.norm_forward), callable_kernel(rowwise.norm_backward)
times, multiply_transposed = callable_kernel(strided.times), callable_kernel(transposed.multiply_transposed)
transpose_task, transpose_tasks = (
    callable_kernel(transposed.transpose_task),
    callable_kernel(transposed.transpose_tasks),
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("columns", [LANES, WIDTH, 3 * LANES, 4 * WIDTH])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_products_of_any_strides_are_those_of_float64(rows: int, columns: int, turned: bool) -> None:
    depth = 19
    x, w = numbers(rows + 1, depth + 3), numbers(depth, columns + 5, seed=1)
    out = numbers(rows + 2, columns + 4, seed=2)
    before = out.clone()
    source = x.t().contiguous() if turned else x
    step, forward = (4, source.stride(0) * 4) if turned else (source.stride(0) * 4, 4)
    expected = 0.5 * (x[:rows, :depth].double() @ w[:, :columns].double())
    for add, wanted in ((SET, expected), (ADD, 2 * expected)):
        times(
            times_address(), rows, columns, source.data_ptr(), step, forward, w.data_ptr(), w.stride(0) * 4, depth,
            out.data_ptr(), out.stride(0) * 4, add, 0.5,
        )  # fmt: skip
        assert float((out[:rows, :columns].double() - wanted).abs().max()) < 1e-5
    assert torch.equal(out[rows:], before[rows:])
    assert torch.equal(out[:, columns:], before[:, columns:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(PANEL, PANEL), (5 * PANEL, 3 * PANEL), (30 * PANEL, 2 * PANEL)])
@pytest.mark.parametrize("rows", [1, 4, 6, 20])
def test_the_same_panels_give_the_product_with_the_matrix_turned(dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    weight = numbers(n, k).to(dtype)
    packed = PackedMatrix.pack(weight)
    turned, sample = (
        PackedMatrix.pack(torch.zeros(k, n, dtype=dtype)),
        BF16_PANELS if packed.is_bf16 else FLOAT32_PANELS,
    )
    dy, dx = numbers(rows, n, seed=1), torch.full((rows, k), 7.0)
    for task in range(transpose_tasks(n // PANEL)):
        transpose_task(task, packed.panels.data_ptr(), 0, n // PANEL, k, turned.panels.data_ptr(), sample)
    assert torch.equal(turned.panels, PackedMatrix.pack(weight.t().contiguous()).panels)
    multiply_transposed(
        dy.data_ptr(), n * 4, rows, turned.panels.data_ptr(), 0, k // PANEL, n, dx.data_ptr(), k * 4, 0, sample
    )
    expected = dy.double() @ weight.double()
    assert float((dx.double() - expected).abs().max()) <= n * 2e-7 * float(expected.abs().max())


TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_and_their_slopes_are_those_of_autograd(name: str) -> None:
    size = 6 * LANES
    gate, up, slope = numbers(size) * 4, numbers(size, seed=1), numbers(size, seed=2)
    gate[:5] = torch.tensor([0.0, -100.0, 100.0, -30.0, 30.0])
    wide = [part.double().requires_grad_() for part in (gate, up)]
    expected = TORCH[name](wide[0]) * wide[1]
    expected.backward(slope.double())  # type: ignore[no-untyped-call]  # torch
    out, again, d_gate = (torch.empty(size) for _ in range(3))
    kind, d_up = ACTIVATIONS[name], slope.clone()
    gate_forward(gate.data_ptr(), up.data_ptr(), size, kind, out.data_ptr())
    gate_backward(  # in place of the slope, as the layers call it
        gate.data_ptr(), up.data_ptr(), d_up.data_ptr(), size, kind, again.data_ptr(), d_gate.data_ptr(),
        d_up.data_ptr(),
    )  # fmt: skip
    assert torch.equal(out, again)
    for got, wanted in ((out, expected), (d_gate, wide[0].grad), (d_up, wide[1].grad)):
        assert wanted is not None
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_that_is_not_a_number_stays_so(name: str) -> None:
    gate, one, out = torch.full((LANES,), float("nan")), torch.ones(LANES), torch.zeros(3, LANES)
    gate_backward(
        gate.data_ptr(), one.data_ptr(), one.data_ptr(), LANES, ACTIVATIONS[name], out[0].data_ptr(),
        out[1].data_ptr(), out[2].data_ptr(),
    )  # fmt: skip
    assert bool(out[0].isnan().all())
    assert bool(out[2].isnan().all())


def test_norms_and_their_gradients_are_those_of_autograd() -> None:
    size = 5 * LANES
    x, weight, slope, out, dx = numbers(size), numbers(size, seed=1), numbers(size, seed=2), *torch.empty(2, size)
    wide = x.double().requires_grad_()
    expected = wide * torch.rsqrt(wide.square().mean() + float(EPSILON)) * weight.double()
    expected.backward(slope.double())  # type: ignore[no-untyped-call]  # torch
    norm_forward(x.data_ptr(), weight.data_ptr(), size, EPSILON, out.data_ptr())
    norm_backward(x.data_ptr(), weight.data_ptr(), slope.data_ptr(), size, EPSILON, dx.data_ptr())
    assert wide.grad is not None
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(dx.double(), wide.grad, rtol=2e-6, atol=2e-6)


def test_a_compiled_function_is_called_by_its_address() -> None:
    """From other compiled code, too."""
    link = times_address()

    @njit(nogil=True)  # type: ignore[untyped-decorator]  # numba
    def twice(x: int, w: int, out: int) -> None:
        for _ in range(2):
            strided.times(link, 1, LANES, x, 4, 4, w, LANES * 4, 1, out, LANES * 4, ADD, 1.0)

    x, w, out = torch.full((1, 1), 3.0), torch.ones(1, LANES), torch.zeros(1, LANES)
    twice(x.data_ptr(), w.data_ptr(), out.data_ptr())
    assert bool((out == 6).all())


def test_sequences_are_laid_out_with_whole_panels_and_families_in_order() -> None:
    laid = lay_out_sequences([0, 5, 5, 25, 65, 70], [None, None, (0, 3), None, (0, 5)])
    counts = [5, 0, 20, 40, 5]
    panels = [-(-count // WIDTH) for count in counts]
    assert laid.panels == sum(panels)
    assert laid.table["count"].tolist() == counts
    assert (laid.table[2]["shared"], laid.table[2]["shared_count"]) == (0, 3)
    families = [
        laid.members[start:stop].tolist() for start, stop in zip(laid.families, laid.families[1:], strict=False)
    ]
    assert sorted(families) == [[0, 2, 4], [1], [3]]
    assert families[-1] == [1]  # the smallest comes last
    places = [panel * WIDTH for panel in np.cumsum([0, *panels[:-1]])]
    assert laid.places[0] == places[0]
    assert laid.places[5] == places[2]
    assert laid.places[69] == places[4] + 4
    assert laid.items[:, 2].sum() == 70


@pytest.mark.parametrize("prefix", [(0, 6), (1, 1), (7, 1), (2, 1)])
def test_beginnings_that_cannot_be_shared_are_refused(prefix: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot"):
        lay_out_sequences([0, 5, 9, 12], [None, prefix, (0, 2)])


def test_rows_are_laid_out_by_slot_in_stream_order() -> None:
    ranks = [[4] * 7, [0, 0, 9, 0, 0, 0, 0], [0] * 7]
    tables = LoraTables.empty(torch.zeros(10_000), in_features=[16] * 7, out_features=[16] * 7, slots=3)
    offset = 0
    for slot, row in enumerate(ranks):
        offset += tables.place(slot, offset, row, [1.0] * 7)
    slots = [1] * 30 + [-1] * 3 + [0] * 5 + [1] * 2 + [2]
    slices = ((0, 16), (16, 32), (32, 48))
    sites = [LoraSite(row, 16, slices[:count]) for row, count in ((0, 3), (3, 1), (4, 2), (6, 1))]
    laid = lay_out_rows(len(slots), LoraBatch(tables, build_segments(slots)), sites, layers=1)
    assert laid.slots.tolist() == [0, 1, 2]
    assert laid.runs.tolist() == [[0, 33, 5], [1, 0, 30], [1, 38, 2], [2, 40, 1]]
    assert laid.bounds.tolist() == [0, 1, 3, 4]
    assert laid.pieces[:, 2].sum() == len(slots)
    assert laid.pieces[:, 1].tolist() == np.cumsum([0, *laid.pieces[:-1, 2]]).tolist()
    rank = -(-4 // LANES) * LANES
    assert laid.columns == 3 * rank + rank + 2 * rank + rank
    assert laid.offsets.shape == (3, 11)
    assert laid.packed == rank * (3 + 1 + 2 + 1) * 16 * 2 + -(-9 // LANES) * LANES * 16 * 2


def test_a_workspace_gives_the_same_memory_again() -> None:
    workspace = Workspace()
    assert workspace.scratch(100).data_ptr() == workspace.scratch(50).data_ptr()
    first, second = workspace.take(1000), workspace.take(1000)
    assert first.data_ptr() != second.data_ptr()
    workspace.give(first)
    assert workspace.take(900).data_ptr() == first.data_ptr()
    workspace.give(second)
    assert workspace.take(5000).numel() >= 5000  # too small ones are let go
    assert not workspace._free
    block, places = cut({1: 3, 2: 40}, workspace.take)
    assert places[1] == block.data_ptr()
    assert places[2] == block.data_ptr() + 64
