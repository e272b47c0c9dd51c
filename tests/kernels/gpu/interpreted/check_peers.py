"""What the benchmark compares us with computes the same thing; otherwise its times would mean nothing."""

from __future__ import annotations

import pytest
import torch

from tenora_kernels.gpu import backend
from tenora_kernels.reference import add_lora_reference
from tests.bench.gpu.protocol import Group, Measurement
from tests.bench.gpu.setting import Setting
from tests.kernels.cases import worst

GROUP = Group("tiny", "qkv", 64, (64, 32, 32))
CASES = [
    Measurement(GROUP, 6),
    Measurement(GROUP, 6, "8-64"),
    Measurement(GROUP, 6, "16+64", "uniform"),
    Measurement(GROUP, 8, distribution="identical", base_share=0.25),
    Measurement(GROUP, 6, distribution="zipf", partial=True),
    Measurement(GROUP, 66, distribution="prefill+decode"),
]


@pytest.mark.full
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.name)
def test_ours_and_the_peers_agree(case: Measurement) -> None:
    setting = Setting.build(case, torch.device("cpu"), layers=2, deviation=0.2)
    x, y = setting.x, setting.y
    for layer in range(2):
        wanted = add_lora_reference(y, x, setting.sites[layer], setting.tables, case.slots())
        ours, sgmv, grouped = y.clone(), y.clone(), y.clone()
        backend.forward(ours, x, setting.sites[layer], setting.prepared.batch(setting.slot_of_row))
        setting.sgmv[layer].add(sgmv, x, setting.sums())
        setting.grouped[layer].add(grouped, x)
        assert float((wanted - y.double()).abs().max()) > 0.5
        assert worst(ours, wanted) <= 2**-7
        assert worst(sgmv, wanted) <= 2**-6
        assert worst(grouped, wanted) <= 2**-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_those_of_the_adapters_in_use(case: Measurement) -> None:
    setting = Setting.build(case, torch.device("cpu"), layers=1)
    used = {slot for slot in case.slots() if slot >= 0}
    tables = setting.tables
    sizes = [tables.a(row, slot).nbytes + tables.bt(row, slot).nbytes for slot in used for row in range(3)]
    assert case.true_bytes() == sum(sizes)
