"""The base projection with the low-rank term in it, on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenora_kernels.gpu import backend, launch
from tenora_kernels.gpu.context import step_of
from tenora_kernels.layout import LoraSite
from tenora_kernels.reference import add_lora_reference
from tests.kernels.cases import DOWN, QKV, Case, make_case, worst
from tests.kernels.gpu.cases import INTERPRETED, LAYOUTS, MIXED, batch_of
from tests.support.full import full_but

SMALL = ([4, -1, 0, 5, 2, 4, -1, 5], MIXED)
TYPES = [torch.bfloat16, torch.float16]


def base(case: Case, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(case.width(), case.site.in_features, generator=generator).mul_(0.1).to(case.x.dtype)
    return weight, torch.randn(case.width(), generator=generator).to(case.x.dtype) if bias else None


def wanted(case: Case, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = case.x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    return add_lora_reference(y, case.x, case.site, case.tables, case.slots)


@pytest.mark.parametrize("dtype", full_but(torch.bfloat16, TYPES), ids=str)
@pytest.mark.parametrize("site", [QKV, DOWN], ids=["qkv", "down"])
@pytest.mark.parametrize("bias", full_but(True, [False, True]), ids=["no bias", "bias"])
def test_equals_the_reference(site: LoraSite, dtype: torch.dtype, bias: bool, prefill: None) -> None:
    case = make_case(*SMALL, site=site, dtype=dtype)
    weight, b = base(case, bias=bias)
    assert backend.fits_gemm(case.x, weight, site, batch_of(case))
    got = backend.linear(case.x, weight, b, site, batch_of(case), in_gemm=True)
    assert worst(got, wanted(case, weight, b)) <= INTERPRETED[dtype]
    assert torch.equal(got, backend.linear(case.x, weight, b, site, batch_of(case), in_gemm=True))


def test_several_blocks_of_everything(prefill: None, small_blocks: None) -> None:
    case = make_case([4] * 140 + [-1, 0, -1, 3], MIXED, dtype=torch.bfloat16)
    weight, _ = base(case, bias=False)
    got = backend.linear(case.x, weight, None, QKV, batch_of(case), in_gemm=True)
    assert worst(got, wanted(case, weight, None)) <= INTERPRETED[torch.bfloat16]


def test_rows_of_the_base_have_the_bits_of_a_batch_without_adapters(prefill: None) -> None:
    case = make_case(*SMALL, dtype=torch.bfloat16)
    weight, _ = base(case, bias=False)
    got = backend.linear(case.x, weight, None, QKV, batch_of(case), in_gemm=True)
    plain = torch.empty_like(got)
    everything_base = Case(case.y, case.x, QKV, case.tables, [-1] * 8)
    launch.launch_gemm(plain, case.x, weight, None, QKV, step_of(batch_of(everything_base)))
    rows = [t for t, slot in enumerate(case.slots) if slot < 0]
    assert torch.equal(got[rows], plain[rows])
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("layout", ["mixed, a quarter base", "all base", "no rows"])
def test_shapes_that_do_not_fit_take_two_steps(layout: str) -> None:
    case = make_case(*LAYOUTS[layout])
    weight, b = base(case, bias=True)
    assert not backend.fits_gemm(case.x, weight, QKV, batch_of(case))
    got = backend.linear(case.x, weight, b, QKV, batch_of(case))
    assert worst(got, wanted(case, weight, b)) <= INTERPRETED[torch.float32]
    torch.testing.assert_close(
        backend.linear(case.x, weight, b, QKV, None), torch.nn.functional.linear(case.x, weight, b)
    )


def test_what_does_not_fit(prefill: None) -> None:
    case = make_case(*SMALL, dtype=torch.bfloat16)
    weight, _ = base(case, bias=False)
    batch = batch_of(case)
    assert backend.fits_gemm(case.x, weight, QKV, batch)
    gap = LoraSite(0, 48, ((0, 48), (50, 64), (64, 80)))
    assert not backend.fits_gemm(case.x, weight, gap, batch)
    assert not backend.fits_gemm(case.x, torch.cat([weight, weight]), QKV, batch)
    assert not backend.fits_gemm(case.x.float(), weight.float(), QKV, batch)
    assert not backend.fits_gemm(case.x, torch.cat([weight, weight], 1)[:, :48], QKV, batch)
