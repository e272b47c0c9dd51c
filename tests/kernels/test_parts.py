"""Scales of columns and bottlenecks against their float64 twins, forward and backward, in mixed batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tenora_kernels.flags import ACTIVATIONS, BIAS_OUTSIDE, BOTTLENECKS, PARALLEL, SCALES, WITH_RESIDUAL
from tenora_kernels.layout import BottleneckSite, LoraBatch, LoraSite, LoraTables, build_segments
from tenora_kernels.ops import add_bottleneck, scale_columns
from tenora_kernels.reference import add_bottleneck_reference, scale_columns_reference

WIDTH = 12
# Two modules of 8 and 4 columns with a scale each, then one block's bottleneck and its biases.
IN, OUT = (8, 4, WIDTH, WIDTH, 1), (0, 0, WIDTH, 0, 0)
SITE = LoraSite(0, 6, ((0, 8), (8, WIDTH)), scale_row=0)
BLOCK = BottleneckSite(row=2, outer_row=3, inner_row=4, features=WIDTH)
RANKS = (
    (1, 1, 0, 0, 0),
    (0, 1, 0, 0, 0),
    (0, 0, 5, 1, 5),
    (0, 0, 3, 0, 0),
    (1, 0, 2, 1, 2),
    (0, 0, 0, 0, 0),
    (0, 0, 4, 1, 4),
)
FLAGS = (
    *(SCALES, SCALES | BIAS_OUTSIDE, BOTTLENECKS, BOTTLENECKS | PARALLEL | 3, SCALES | BOTTLENECKS | 1, 0),
    BOTTLENECKS | WITH_RESIDUAL | 3,
)
ROWS = (-1, 2, 0, 0, 5, 3, 3, 4, 1, 2, 6, 6)


def make_tables(dtype: torch.dtype, *, train: bool, flags: tuple[int, ...] = FLAGS) -> LoraTables:
    generator = torch.Generator().manual_seed(3)
    size = sum(r * (i + o) for ranks in RANKS for r, i, o in zip(ranks, IN, OUT, strict=True))
    arena = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.zeros(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32) if train else None
    tables = LoraTables.empty(arena, in_features=IN, out_features=OUT, slots=len(RANKS), grad=grad)
    start = 0
    for slot, ranks in enumerate(RANKS):
        start += tables.place(slot, start, ranks, [0.5 + slot] * len(IN), flags=flags[slot])
    return tables


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    y, x = (torch.randn(len(ROWS), WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return y, x, torch.randn(WIDTH, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_columns_are_scaled_as_the_slow_twin_says_and_other_rows_keep_their_bits(dtype: torch.dtype) -> None:
    tables, (y, _, bias) = make_tables(dtype, train=False), inputs(dtype)
    wanted = scale_columns_reference(y, SITE, tables, ROWS, bias)
    found = scale_columns(y.clone(), SITE, LoraBatch(tables, build_segments(ROWS)), bias)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    untouched = [row for row, slot in enumerate(ROWS) if slot not in (0, 1, 4)]
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_bottlenecks_are_added_as_the_slow_twin_says_and_other_rows_keep_their_bits(activation: int) -> None:
    flags = tuple(flag & ~7 | activation for flag in FLAGS)
    tables, (y, x, _) = make_tables(torch.float32, train=False, flags=flags), inputs(torch.float32)
    wanted = add_bottleneck_reference(y, x, BLOCK, tables, ROWS)
    found = add_bottleneck(y.clone(), x, BLOCK, LoraBatch(tables, build_segments(ROWS)))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    untouched = [row for row, slot in enumerate(ROWS) if slot not in (2, 3, 4, 6)]
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize("part", ["scales", "bottlenecks"])
def test_gradients_are_those_of_the_slow_twin(part: str) -> None:
    tables, (y, x, bias) = make_tables(torch.float64, train=True), inputs(torch.float64)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batch = LoraBatch(tables, build_segments(ROWS))

    def gradients(run: Any) -> tuple[Tensor, Tensor]:
        own, given = y.clone().requires_grad_(), x.clone().requires_grad_()
        (run(own, given) * upstream).sum().backward()
        return own.grad, torch.zeros_like(x) if given.grad is None else given.grad

    if part == "scales":
        found = gradients(lambda own, _: scale_columns(own, SITE, batch, bias))
    else:
        found = gradients(lambda own, given: add_bottleneck(own, given, BLOCK, batch))
    of_weights = tables.grad
    twin = make_tables(torch.float64, train=False)
    twin.arena.requires_grad_()
    if part == "scales":
        wanted = gradients(lambda own, _: scale_columns_reference(own, SITE, twin, ROWS, bias))
    else:
        wanted = gradients(lambda own, given: add_bottleneck_reference(own, given, BLOCK, twin, ROWS))
    for one, other in zip((*found, of_weights), (*wanted, twin.arena.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert of_weights is not None
    assert of_weights.abs().max() > 0


def test_a_batch_without_such_adapters_is_handed_back_as_it_is() -> None:
    tables, (y, x, bias) = make_tables(torch.float32, train=False), inputs(torch.float32)
    batch = LoraBatch(tables, build_segments([5 if slot >= 0 else -1 for slot in ROWS]))
    assert scale_columns(y, SITE, batch, bias) is y
    assert add_bottleneck(y, x, BLOCK, batch) is y
