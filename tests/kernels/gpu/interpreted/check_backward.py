"""Gradients of the kernels against autograd of the reference, on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenora_kernels.gpu import backend
from tenora_kernels.layout import LoraSite
from tests.kernels.cases import DOWN, QKV, Case, make_case, worst
from tests.kernels.gpu.cases import INTERPRETED, LAYOUTS, MIXED, batch_of
from tests.kernels.gpu.launches import TRAINED, OperandTypes
from tests.kernels.test_gradients import reference_gradients
from tests.support.full import full_but

SMALL = ([4, -1, 0, 5, 2, 4, -1, 5], MIXED)


def weight_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(case.slots), case.width(), generator=generator, dtype=torch.float64).to(case.y.dtype)


def gradients(case: Case, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.zeros(case.x.shape, dtype=torch.float32)
    backend.backward(dy, case.x, case.site, batch_of(case), dx)
    assert case.tables.grad is not None
    return dx, case.tables.grad


@pytest.mark.parametrize("dtype", full_but(torch.bfloat16, INTERPRETED), ids=str)
@pytest.mark.parametrize(
    "layout",
    full_but(
        ["partial targets", "no rows"], ["partial targets", "all distinct", "no module at all", "all base", "no rows"]
    ),
)
def test_equal_autograd_of_the_reference(layout: str, dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS[layout]
    case = make_case(slots, ranks, dtype=dtype, train=True)
    dy = weight_of(case)
    wanted_dx, _, wanted_arena = reference_gradients(case, dy)
    dx, grad = gradients(case, dy)
    # dX is summed in float32 from 16 or 24 bits of dS; the interpreter truncates these where a device rounds.
    assert worst(dx, wanted_dx) <= 4e-6
    assert worst(grad, wanted_arena) <= 4e-6


def test_the_types_that_training_has_are_among_them() -> None:
    """dY, x and the weights of one two-byte type, gradients in float32."""
    case = make_case(*SMALL, dtype=TRAINED.x, train=True)
    assert case.tables.grad is not None
    found = OperandTypes(
        weight_of(case).dtype, case.x.dtype, case.tables.arena.dtype, case.tables.grad.dtype, TRAINED.dx
    )
    assert found == TRAINED
    assert TRAINED.x in INTERPRETED


def test_rows_of_one_type_on_weights_of_another() -> None:
    case = make_case(*SMALL, dtype=torch.bfloat16, weights=torch.float32, train=True)
    dy = weight_of(case)
    wanted_dx, _, wanted_arena = reference_gradients(case, dy)
    dx, grad = gradients(case, dy)
    assert worst(dx, wanted_dx) <= 4e-6
    assert worst(grad, wanted_arena) <= 4e-6


@pytest.mark.full
@pytest.mark.parametrize("site", full_but(DOWN, [QKV, DOWN]), ids=["qkv", "down"])
@pytest.mark.parametrize("large", full_but(True, [False, True]), ids=["decode tiles", "prefill tiles"])
def test_several_blocks_of_everything(
    site: LoraSite, large: bool, small_blocks: None, request: pytest.FixtureRequest
) -> None:
    if large:
        request.getfixturevalue("prefill")
    case = make_case([0] * 40 + [4, -1, 5], MIXED, site=site, train=True)
    dy = weight_of(case)
    wanted_dx, _, wanted_arena = reference_gradients(case, dy)
    dx, grad = gradients(case, dy)
    assert worst(dx, wanted_dx) <= INTERPRETED[torch.float32]
    assert worst(grad, wanted_arena) <= INTERPRETED[torch.float32]
    again = make_case([0] * 40 + [4, -1, 5], MIXED, site=site, train=True)
    dx_again, grad_again = gradients(again, dy)
    assert torch.equal(dx, dx_again)
    assert torch.equal(grad, grad_again)


def test_they_add_up_and_stay_in_their_slot() -> None:
    case = make_case([0, 2, 0], [[4] * 7, [2] * 7, [3] * 7], train=True)
    dy = torch.ones(3, 80)
    dy[1] = 0
    dx, grad = gradients(case, dy)
    once = grad.clone()
    gradients(case, dy)
    torch.testing.assert_close(grad, 2 * once)
    assert case.tables.grad_a(0, 0).any()
    for slot in (1, 2):
        assert not any(case.tables.grad_a(row, slot).any() or case.tables.grad_bt(row, slot).any() for row in range(3))
    assert not dx[1].any()


def test_a_gradient_that_is_a_broadcast_view() -> None:
    """`sum().backward()` gives a dY of stride 0."""
    case = make_case(*SMALL, train=True)
    wanted_dx, _, wanted_arena = reference_gradients(case, torch.ones(8, 80))
    dx, grad = gradients(case, torch.ones(1, 1).expand(8, 80))
    assert worst(dx, wanted_dx) <= INTERPRETED[torch.float32]
    assert worst(grad, wanted_arena) <= INTERPRETED[torch.float32]


@pytest.mark.full
def test_each_gradient_without_the_other() -> None:
    case = make_case(*SMALL)
    dy = weight_of(case)
    wanted_dx, _, _ = reference_gradients(case, dy)
    dx = torch.zeros(8, 48)
    backend.backward(dy, case.x, QKV, batch_of(case), dx)
    assert worst(dx, wanted_dx) <= INTERPRETED[torch.float32]
    training = make_case(*SMALL, train=True)
    _, _, wanted_arena = reference_gradients(training, dy)
    backend.backward(dy, training.x, QKV, batch_of(training), None)
    assert training.tables.grad is not None
    assert worst(training.tables.grad, wanted_arena) <= INTERPRETED[torch.float32]
    assert float(training.tables.grad.abs().max()) > 0


def test_mutations_exceed_the_tolerance() -> None:
    case = make_case(*SMALL, train=True)
    dy = weight_of(case)
    wanted_dx, _, wanted_arena = reference_gradients(case, dy)
    case.slots[3] = 4
    dx, grad = gradients(case, dy)
    assert worst(dx, wanted_dx) > 1e-2, "a wrong slot went unseen in dX"
    assert worst(grad, wanted_arena) > 1e-2, "a wrong slot went unseen in the weight gradients"
