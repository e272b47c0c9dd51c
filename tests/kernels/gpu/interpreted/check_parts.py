"""Scales and bottlenecks of rows that are grouped on the device, against their float64 twins, in mixed batches."""

from __future__ import annotations

import pytest
import torch

from tenora_kernels.flags import ACTIVATIONS, BOTTLENECKS, EPILOGUE, SCALES
from tenora_kernels.gpu import configs
from tenora_kernels.gpu.context import GpuBatch, GpuLora
from tenora_kernels.layout import LoraTables
from tenora_kernels.ops import add_bottleneck, scale_columns
from tenora_kernels.reference import add_bottleneck_reference, scale_columns_reference
from tests.kernels.test_parts import BLOCK, FLAGS, ROWS, SITE, inputs, make_tables

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


def batch_of(tables: LoraTables, rows: tuple[int, ...] = ROWS, flags: int = EPILOGUE) -> GpuBatch:
    return GpuLora(tables, max_rows=16, max_rank=5).batch(torch.tensor(rows), flags=flags)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_scaled(dtype: torch.dtype, biased: bool) -> None:
    tables, (y, _, bias) = make_tables(dtype, train=False), inputs(dtype)
    given = bias if biased else None
    wanted = scale_columns_reference(y, SITE, tables, ROWS, given)
    found = scale_columns(y.clone(), SITE, batch_of(tables), given)
    torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])
    untouched = [row for row, slot in enumerate(ROWS) if slot not in (0, 1, 4)]
    assert torch.equal(found[untouched], y[untouched])
    assert not torch.equal(found, y)


@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
def test_bottlenecks_are_added(activation: int) -> None:
    flags = tuple(flag & ~7 | activation for flag in FLAGS)
    tables, (y, x, _) = make_tables(torch.float32, train=False, flags=flags), inputs(torch.float32)
    wanted = add_bottleneck_reference(y, x, BLOCK, tables, ROWS)
    found = add_bottleneck(y.clone(), x, BLOCK, batch_of(tables))
    torch.testing.assert_close(found.double(), wanted, **TOLERANCE[torch.float32])
    untouched = [row for row, slot in enumerate(ROWS) if slot not in (2, 3, 4, 6)]
    assert torch.equal(found[untouched], y[untouched])


@pytest.mark.usefixtures("prefill")
def test_bottlenecks_are_added_to_large_batches() -> None:
    assert configs.DECODE_ROWS == 0
    tables, (y, x, _) = make_tables(torch.bfloat16, train=False), inputs(torch.bfloat16)
    wanted = add_bottleneck_reference(y, x, BLOCK, tables, ROWS)
    found = add_bottleneck(y.clone(), x, BLOCK, batch_of(tables))
    # What is read with the residual stream is the rounded sum of two rounded ones; its weights here are large.
    one = torch.tensor([slot == 6 for slot in ROWS])
    torch.testing.assert_close(found[~one].double(), wanted[~one], **TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(found[one].double(), wanted[one], rtol=0, atol=1e-2 * float(wanted[one].abs().max()))


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    tables, (y, x, bias) = make_tables(torch.float32, train=False), inputs(torch.float32)
    scaled = scale_columns(y.clone(), SITE, batch_of(tables), bias)
    added = add_bottleneck(y.clone(), x, BLOCK, batch_of(tables))
    for row, slot in enumerate(ROWS):
        alone = batch_of(tables, (slot,))
        assert torch.equal(scale_columns(y[row : row + 1].clone(), SITE, alone, bias)[0], scaled[row])
        if ROWS.count(slot) == 1:
            assert torch.equal(add_bottleneck(y[row : row + 1].clone(), x[row : row + 1], BLOCK, alone)[0], added[row])


def test_what_no_row_has_is_not_launched() -> None:
    tables, (y, x, bias) = make_tables(torch.float32, train=False), inputs(torch.float32)
    lora = GpuLora(tables, max_rows=16, max_rank=5)
    slots = torch.tensor(ROWS).numpy()
    assert lora.flags(slots) == SCALES | BOTTLENECKS
    assert (lora.flags(slots[:1]), lora.flags(slots[2:5]), lora.flags(slots[1:2])) == (0, SCALES, BOTTLENECKS)
    assert torch.equal(scale_columns(y.clone(), SITE, batch_of(tables, flags=BOTTLENECKS), bias), y)
    assert torch.equal(add_bottleneck(y.clone(), x, BLOCK, batch_of(tables, flags=SCALES)), y)
