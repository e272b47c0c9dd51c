"""The forward kernels against the float64 reference, on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tenora_kernels.gpu import backend, configs
from tenora_kernels.layout import LoraSite
from tests.kernels.cases import DOWN, GATE_UP, QKV, Case, make_case, make_tables, worst
from tests.kernels.gpu.cases import INTERPRETED, LAYOUTS, MIXED, batch_of, edit, forward, reference
from tests.support.full import full, full_but

MIX = LAYOUTS["mixed, a quarter base"]
SMALL = ([4, -1, 0, 5, 2, 4, -1, 5], MIXED)
QUICK = ["sorted run", "all base", "partial targets", "one row", "no rows"]
SERVED = full_but(torch.bfloat16, INTERPRETED)
MIXED_TYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("dtype", full_but(torch.float32, INTERPRETED), ids=str)
@pytest.mark.parametrize("layout", full_but(QUICK, LAYOUTS))
def test_equals_the_reference(layout: str, dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS[layout]
    case = make_case(slots, ranks, dtype=dtype)
    got = forward(case)
    assert worst(got, reference(case)) <= INTERPRETED[dtype]
    for t, slot in enumerate(slots):
        for j, (start, stop) in enumerate(QKV.slices):
            same = torch.equal(got[t, start:stop], case.y[t, start:stop])
            assert same == (slot < 0 or ranks[slot][j] == 0)


@pytest.mark.parametrize("site", full_but(DOWN, [QKV, GATE_UP, DOWN]), ids=["qkv", "gate_up", "down"])
def test_several_blocks_of_everything(site: LoraSite, small_blocks: None) -> None:
    case = make_case(*SMALL, site=site)
    assert worst(forward(case), reference(case)) <= INTERPRETED[torch.float32]


@pytest.mark.parametrize(("dtype", "weights"), [MIXED_TYPES[0], full(*MIXED_TYPES[1])], ids=str)
def test_rows_of_one_type_on_weights_of_another(dtype: torch.dtype, weights: torch.dtype) -> None:
    case = make_case(*SMALL, dtype=dtype, weights=weights)
    assert worst(forward(case), reference(case)) <= INTERPRETED[dtype]


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_a_repeat_gives_equal_bits(dtype: torch.dtype) -> None:
    case = make_case(*SMALL, dtype=dtype)
    assert torch.equal(forward(case), forward(case))


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_prefill_tiles(dtype: torch.dtype, prefill: None) -> None:
    case = make_case([4] * 130 + [-1, 1], MIXED, site=DOWN, dtype=dtype)
    assert worst(forward(case), reference(case)) <= INTERPRETED[dtype]


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_mutations_exceed_the_tolerance(dtype: torch.dtype) -> None:
    case = make_case(*SMALL, dtype=dtype)
    wanted = reference(case)
    assert worst(forward(case), wanted) <= INTERPRETED[dtype]
    case.slots[3] = 4
    assert worst(forward(case), wanted) > 2 * INTERPRETED[dtype], "a wrong slot went unseen"
    case.slots[3] = 5
    scale = case.tables.scale(1, 4)
    edit(case, "scaling", 1, 4, scale * 1.25)
    assert worst(forward(case), wanted) > 2 * INTERPRETED[dtype], "a wrong scale went unseen"
    edit(case, "scaling", 1, 4, scale)
    edit(case, "ranks", 2, 5, 63)
    assert worst(forward(case), wanted) > 2 * INTERPRETED[dtype], "a missing rank went unseen"
    edit(case, "ranks", 2, 5, 64)
    assert worst(forward(case), wanted) <= INTERPRETED[dtype]


@pytest.mark.full
@pytest.mark.parametrize("blocks", [3])
def test_a_program_takes_several_blocks(
    blocks: int, prefill: None, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([4] * 70 + [5, -1, 2], MIXED)
    one = forward(case)
    assert worst(one, reference(case)) <= INTERPRETED[torch.float32]
    monkeypatch.setattr(configs, "blocks_per_program", lambda count, device: blocks)
    assert torch.equal(forward(case), one)


@pytest.mark.parametrize("site", full_but(DOWN, [QKV, DOWN]), ids=["qkv", "down"])
@pytest.mark.parametrize("processors", full_but(200, [3, 200]))
def test_programs_without_a_tile_help_the_others(
    processors: int, site: LoraSite, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([4, 4, -1, 4, 2, 5, 5, 4], MIXED, site=site)
    alone = forward(case)
    assert worst(alone, reference(case)) <= INTERPRETED[torch.float32]
    monkeypatch.setattr(configs, "_processors", lambda device: processors)
    monkeypatch.setattr(configs, "blocks_per_program", lambda count, device: 1)
    assert torch.equal(forward(case), alone)


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    """Rows that are alone with their adapter; rows of one adapter among themselves."""
    case = make_case([4, -1, 0, 5, 2, 4, -1, 5, 4], MIXED)
    whole = forward(case)
    for chosen in ([2], [4], [0, 5], [8, 0], [3, 7], [2, 4, 7, 3]):
        part = Case(case.y[chosen], case.x[chosen], QKV, case.tables, [case.slots[t] for t in chosen])
        assert torch.equal(forward(part), whole[chosen])


def test_a_bad_adapter_stays_in_its_rows() -> None:
    case = make_case(*SMALL)
    clean = forward(case)
    case.tables.a(0, 4).fill_(float("nan"))
    got = forward(case)
    rest = [t for t, slot in enumerate(case.slots) if slot != 4]
    assert torch.equal(got[rest], clean[rest])
    assert got[0].isnan().any()


def test_views_and_mixed_types() -> None:
    case = make_case(*SMALL)
    case.tables = make_tables(MIXED, torch.bfloat16)
    wide = torch.full((8, 200), 7.0)
    wide[:, 60:140] = case.y
    wanted = reference(case)
    columns = torch.zeros(8, 96)
    columns[:, ::2] = case.x
    backend.forward(wide[:, 60:140], columns[:, ::2], QKV, batch_of(case))
    assert worst(wide[:, 60:140], wanted) <= INTERPRETED[torch.float32]
    assert (wide[:, :60] == 7).all()
    assert (wide[:, 140:] == 7).all()
    scattered = torch.zeros(8, 160)
    scattered[:, ::2] = case.y
    backend.forward(scattered[:, ::2], case.x, QKV, batch_of(case))
    assert worst(scattered[:, ::2], wanted) <= INTERPRETED[torch.float32]


def test_more_than_three_modules(small_blocks: None) -> None:
    site = LoraSite(0, 48, ((0, 48), (48, 64), (64, 80), (80, 128)))
    case = make_case([2, -1, 3], MIXED, site=site)
    assert worst(forward(case), reference(case)) <= INTERPRETED[torch.float32]


def test_float64_is_left_to_torch() -> None:
    case = make_case(*SMALL, dtype=torch.float64)
    assert worst(forward(case), reference(case)) <= 1e-12
