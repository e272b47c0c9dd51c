"""`add_lora` against the float64 reference: every mix of ranks, slots and order, and what must fail if it is wrong."""

from __future__ import annotations

import pytest
import torch

from tenora_kernels import ops
from tenora_kernels.layout import LoraBatch, LoraSite, build_segments
from tenora_kernels.ops import add_lora
from tenora_kernels.reference import add_lora_reference
from tests.kernels.cases import (
    BACKENDS,
    DOWN,
    DTYPES,
    GATE_UP,
    LAYOUTS,
    MIXED,
    ON_EVERY_BACKEND,
    QKV,
    TOLERANCE,
    Case,
    make_case,
    make_tables,
    worst,
)


@pytest.fixture(params=ON_EVERY_BACKEND, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Every type that a backend takes, with `add_lora` on that backend."""
    name, dtype = request.param
    monkeypatch.setattr(ops, "select_backend", lambda *_: BACKENDS[name])
    return dtype


def reference(case: Case, slots: list[int] | None = None) -> torch.Tensor:
    return add_lora_reference(case.y, case.x, case.site, case.tables, case.slots if slots is None else slots)


@pytest.mark.parametrize("site", [QKV, GATE_UP, DOWN], ids=["qkv", "gate_up", "down"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference(layout: str, site: LoraSite, dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS[layout]
    case = make_case(slots, ranks, site=site, dtype=dtype)
    wanted, before = reference(case), case.y.clone()
    got = add_lora(case.y, case.x, site, case.batch)
    assert got is case.y
    assert worst(got, wanted) <= TOLERANCE[dtype]
    base = [t for t, slot in enumerate(slots) if slot < 0]
    assert torch.equal(got[base], before[base])


def test_columns_of_skipped_modules_keep_their_bits(dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS["partial targets"]
    case = make_case(slots, ranks, dtype=dtype)
    before = case.y.clone()
    add_lora(case.y, case.x, QKV, case.batch)
    for t, slot in enumerate(slots):
        for j, (start, stop) in enumerate(QKV.slices):
            changed = not torch.equal(case.y[t, start:stop], before[t, start:stop])
            assert changed == (slot >= 0 and ranks[slot][j] > 0)


def test_repeats_to_the_bit(dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS["mixed, a quarter base"]
    case = make_case(slots, ranks, dtype=dtype)
    first, second = case.y.clone(), case.y.clone()
    assert torch.equal(add_lora(first, case.x, QKV, case.batch), add_lora(second, case.x, QKV, case.batch))


def test_mutations_exceed_the_tolerance(dtype: torch.dtype) -> None:
    """The tolerance tells a right result from one with the wrong slot, the wrong scale or one rank short."""
    slots, ranks = LAYOUTS["mixed, a quarter base"]
    case = make_case(slots, ranks, dtype=dtype)
    wanted = reference(case)
    scaling = case.tables.scaling.clone()

    def run() -> float:
        return worst(add_lora(case.y.clone(), case.x, QKV, case.batch), wanted)

    assert run() <= TOLERANCE[dtype]
    row = next(t for t, slot in enumerate(slots) if slot == 3)
    case.slots[row] = 2
    assert run() > 2 * TOLERANCE[dtype], "a wrong slot went unseen"
    case.slots[row] = 3
    case.tables.scaling[1, 3] *= 1.25
    assert run() > 2 * TOLERANCE[dtype], "a wrong scale went unseen"
    case.tables.scaling.copy_(scaling)
    case.tables.ranks[2, 5] -= 1
    assert run() > 2 * TOLERANCE[dtype], "a missing rank went unseen"
    case.tables.ranks[2, 5] += 1
    assert run() <= TOLERANCE[dtype]


def test_a_bad_adapter_stays_in_its_rows(dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS["mixed, a quarter base"]
    case = make_case(slots, ranks, dtype=dtype)
    clean = add_lora(case.y.clone(), case.x, QKV, case.batch)
    case.tables.a(0, 1).fill_(float("nan"))
    got = add_lora(case.y.clone(), case.x, QKV, case.batch)
    others = [t for t, slot in enumerate(slots) if slot != 1]
    assert torch.equal(got[others], clean[others])
    assert got[[t for t, slot in enumerate(slots) if slot == 1]].isnan().any(dim=1).all()


def test_without_a_batch_y_is_returned() -> None:
    y = torch.ones(3, 80)
    assert add_lora(y, torch.ones(3, 48), QKV, None) is y
    assert torch.equal(y, torch.ones(3, 80))


def test_writes_through_a_view(dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS["mixed, a quarter base"]
    case = make_case(slots, ranks, dtype=dtype)
    wanted = reference(case)
    wide = torch.full((len(slots), 200), 7.0, dtype=dtype)
    wide[:, 60:140] = case.y
    add_lora(wide[:, 60:140], case.x, QKV, case.batch)
    assert worst(wide[:, 60:140], wanted) <= TOLERANCE[dtype]
    assert (wide[:, :60] == 7).all()
    assert (wide[:, 140:] == 7).all()


@pytest.mark.parametrize("is_bf16", [False, True], ids=["arena", "slots"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_weights_sum_in_float32(backend: str, is_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 pool, or bf16 slots, under a float32 model: the weights are rounded, the sums are not."""
    monkeypatch.setattr(ops, "select_backend", lambda *_: BACKENDS[backend])
    slots, ranks = LAYOUTS["mixed, a quarter base"]
    case = make_case(slots, ranks)
    case.tables = make_tables(ranks, torch.float32 if is_bf16 else torch.bfloat16, is_bf16=is_bf16)
    wanted = reference(case)
    assert worst(add_lora(case.y, case.x, QKV, case.batch), wanted) <= TOLERANCE[torch.float32]


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    tables = make_tables(MIXED, torch.float32)
    batch = LoraBatch(tables, build_segments([0, -1]))
    for y, x in (
        (torch.zeros(3, 80), torch.zeros(3, 48)),
        (torch.zeros(2, 79), torch.zeros(2, 48)),
        (torch.zeros(2, 80), torch.zeros(2, 47)),
        (torch.zeros(2, 1, 80), torch.zeros(2, 48)),
    ):
        with pytest.raises(ValueError, match="do not fit a batch of 2 rows"):
            add_lora(y, x, QKV, batch)
    with pytest.raises(ValueError, match="slot 7 is not one of the tables' 7 slots"):
        LoraBatch(tables, build_segments([7]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_on_a_gpu(dtype: torch.dtype) -> None:
    slots, ranks = LAYOUTS["mixed, a quarter base"]
    case = make_case(slots, ranks, dtype=dtype)
    wanted = reference(case)
    case.tables.arena = case.tables.arena.cuda()
    batch = LoraBatch(case.tables, build_segments(slots, device=torch.device("cuda")))
    got = add_lora(case.y.cuda(), case.x.cuda(), QKV, batch)
    assert worst(got.cpu(), wanted) <= TOLERANCE[dtype]
