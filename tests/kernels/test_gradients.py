"""Gradients of `add_lora` against autograd of the reference."""

from __future__ import annotations

from copy import copy
from functools import cache
from itertools import cycle, product
from typing import cast

import pytest
import torch
from torch import Tensor

from tenora_kernels import ops
from tenora_kernels.layout import LoraTables
from tenora_kernels.ops import add_lora
from tenora_kernels.reference import add_lora_reference
from tests.kernels.cases import (
    BACKENDS,
    DOWN,
    GATE_UP,
    LAYOUTS,
    ON_EVERY_BACKEND,
    QKV,
    TOLERANCE,
    Case,
    make_case,
    worst,
)
from tests.support.full import full

SITES = {"qkv": QKV, "gate_up": GATE_UP, "down": DOWN}
QUICK = set(zip(LAYOUTS, cycle(SITES), strict=False))  # each layout once, each site with a third of them


class _OneView:
    """Tables that give one view of a matrix to all rows: the backward pass of each view writes a whole arena."""

    def __init__(self, tables: LoraTables) -> None:
        self.rank, self.scale = tables.rank, tables.scale
        self.a, self.bt = cache(tables.a), cache(tables.bt)


def reference_gradients(case: Case, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dY and the gradient of the arena, in float64."""
    x, y = (t.detach().double().clone().requires_grad_() for t in (case.x, case.y))
    arena = case.tables.arena.double().clone().requires_grad_()
    tables = copy(case.tables)
    tables.arena, tables.grad = arena, None
    views = cast("LoraTables", _OneView(tables))
    (add_lora_reference(y, x, case.site, views, case.slots) * weight.double()).sum().backward()
    zeros = torch.zeros_like
    return (x.grad if x.grad is not None else zeros(x), y.grad, arena.grad if arena.grad is not None else zeros(arena))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [pair for pair in ON_EVERY_BACKEND if pair[1] != torch.float16],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize(
    ("layout", "site"), [pair if pair in QUICK else full(*pair) for pair in product(LAYOUTS, SITES)]
)
def test_gradients_equal_autograd_of_the_reference(
    layout: str, site: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "select_backend", lambda *_: BACKENDS[backend])
    slots, ranks = LAYOUTS[layout]
    case = make_case(slots, ranks, site=SITES[site], dtype=dtype, train=True)
    weight = torch.randn(len(slots), case.width(), generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )
    dx, dy, d_arena = reference_gradients(case, weight)
    case.x.requires_grad_()
    y = case.y.clone().requires_grad_()
    before = y.detach().clone()
    out = add_lora(y, case.x, case.site, case.batch)
    assert torch.equal(y.detach(), before), "y must not change when a gradient is needed"
    (out * weight).sum().backward()
    assert worst(case.x.grad, dx) <= TOLERANCE[dtype]
    assert torch.equal(y.grad.double(), dy)
    # Every sum over rows is float32, so bf16 operands cost the weight gradients nothing but their own rounding.
    assert case.tables.grad is not None
    assert case.tables.grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert worst(case.tables.grad, d_arena) <= TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]


def test_weight_gradients_without_any_other() -> None:
    """The first layer: neither x nor y requires a gradient, A and B still get theirs."""
    case = make_case([0, -1, 1, 0], [[4] * 7, [2] * 7], train=True)
    weight = torch.ones(4, case.width())
    _, _, wanted = reference_gradients(case, weight)
    add_lora(case.y, case.x, QKV, case.batch).sum().backward()
    assert case.tables.grad is not None
    assert worst(case.tables.grad, wanted) <= TOLERANCE[torch.float32]
    assert float(case.tables.grad.abs().max()) > 0


def test_weight_gradients_add_up_over_calls() -> None:
    case = make_case([0, 1, 1], [[4] * 7, [2] * 7], train=True)
    tables = case.tables
    assert tables.grad is not None
    add_lora(case.y.clone(), case.x, QKV, case.batch).sum().backward()
    once = tables.grad.clone()
    add_lora(case.y.clone(), case.x, QKV, case.batch).sum().backward()
    torch.testing.assert_close(tables.grad, 2 * once)


def test_gradients_stay_in_their_slot() -> None:
    """A slot that is not in the batch, or whose rows get no gradient, has a gradient of exactly zero."""
    case = make_case([0, 2, 0], [[4] * 7, [2] * 7, [3] * 7], train=True)
    out = add_lora(case.y, case.x, QKV, case.batch)
    out[[0, 2]].sum().backward()
    assert float(case.tables.grad_a(0, 0).abs().max()) > 0
    for slot in (1, 2):
        for row in range(3):
            assert not case.tables.grad_a(row, slot).any()
            assert not case.tables.grad_bt(row, slot).any()


def test_serving_tables_give_dx_only() -> None:
    case = make_case([0, -1, 1], [[4] * 7, [2] * 7])
    wanted, _, _ = reference_gradients(case, torch.ones(3, case.width()))
    case.x.requires_grad_()
    add_lora(case.y, case.x, QKV, case.batch).sum().backward()
    assert worst(case.x.grad, wanted) <= TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="hold no gradients"):
        case.tables.grad_a(0, 0)


def test_no_grad_mode_trains_nothing() -> None:
    case = make_case([0, 1], [[4] * 7, [2] * 7], train=True)
    with torch.no_grad():
        out = add_lora(case.y, case.x, QKV, case.batch)
    assert out is case.y
    assert not out.requires_grad


def test_weights_that_change_before_the_backward_pass_are_noticed() -> None:
    case = make_case([0, 1], [[4] * 7, [2] * 7], train=True)
    out = add_lora(case.y, case.x, QKV, case.batch)
    case.tables.a(0, 0).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradcheck() -> None:
    case = make_case([1, -1, 0], [[3] * 7, [2] * 7], site=DOWN, dtype=torch.float64)
    batch = case.batch
    x, y = case.x.requires_grad_(), case.y.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, x: add_lora(y, x, DOWN, batch), (y, x))
