"""The packed matrix product against float64, and what the engine relies on: a row's bits do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenora_kernels.cpu.products.gemm import PANEL, ROW_BLOCK, PackedMatrix, matmul, unpack
from tenora_kernels.cpu.runtime.team import Team

TYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def team() -> Team:
    """Two members, whatever the machine has."""
    return Team(2)


def matrix(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 32, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 5])
@pytest.mark.parametrize(("n", "k"), [(PANEL, 1), (5 * PANEL, 37), (23 * PANEL, 64), (PANEL + 3, 24)])
def test_the_product_is_that_of_float64(team: Team, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    weight, x = matrix(n, k, dtype), matrix(rows, k, torch.float32, seed=1)
    expected = x.double() @ weight.double().t()
    got = matmul(x, PackedMatrix.pack(weight), team)
    bound = x.double().abs() @ weight.double().abs().t() * k * 2**-24 + 1e-12
    assert got.shape == (rows, n)
    assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_has_the_same_bits_in_every_batch(team: Team, dtype: torch.dtype) -> None:
    weight = PackedMatrix.pack(matrix(9 * PANEL, 100, dtype))
    x = matrix(2 * ROW_BLOCK + 5, 100, torch.float32, seed=2)
    whole = matmul(x, weight, team)
    for count in (1, 2, 3, 4, 5, 6, 7, 11, 32, ROW_BLOCK + 1):
        assert torch.equal(matmul(x[7 : 7 + count], weight, team), whole[7 : 7 + count])
    assert torch.equal(matmul(x, weight, Team(1)), whole)


@given(n=st.integers(1, 4 * PANEL), k=st.integers(1, 40), dtype=st.sampled_from(TYPES), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(n: int, k: int, dtype: torch.dtype, seed: int) -> None:
    weight = matrix(n, k, dtype, seed)
    packed = PackedMatrix.pack(weight)
    assert torch.equal(unpack(packed, Team(1)).to(dtype), weight)
    assert torch.equal(unpack(packed, Team(1)), weight.float())
    index = torch.randint(0, n, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(packed.rows(index), weight[index].float())


def test_float16_weights_are_exact_in_float32(team: Team) -> None:
    weight = matrix(PANEL, 8, torch.float16)
    packed = PackedMatrix.pack(weight)
    assert not packed.is_bf16
    assert torch.equal(unpack(packed, team), weight.float())


def test_special_values_stay(team: Team) -> None:
    """Not a number and infinite weights reach their own columns and no others."""
    weight = torch.ones(2 * PANEL, 4, dtype=torch.bfloat16)
    weight[3, 1], weight[PANEL + 1, 0] = float("nan"), float("inf")
    got = matmul(torch.ones(3, 4), PackedMatrix.pack(weight), team)
    assert bool(got[:, 3].isnan().all())
    assert bool(got[:, PANEL + 1].isinf().all())
    others = [column for column in range(2 * PANEL) if column not in (3, PANEL + 1)]
    assert bool((got[:, others] == 4).all())


def test_no_rows_and_strided_rows(team: Team) -> None:
    weight = PackedMatrix.pack(matrix(PANEL, 8, torch.float32))
    assert matmul(torch.empty(0, 8), weight, team).shape == (0, PANEL)
    x = matrix(6, 20, torch.float32)
    assert torch.equal(matmul(x[:, 5:13], weight, team), matmul(x[:, 5:13].contiguous(), weight, team))
    assert torch.equal(matmul(x[::2, :8], weight, team), matmul(x[::2, :8].contiguous(), weight, team))
