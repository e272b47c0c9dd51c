"""What only the compiled low-rank op promises: a row's bits depend on the row and its adapter alone; no odd size."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenora_kernels import torch_backend
from tenora_kernels.cpu.lowrank import lora, lora_blocks
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments
from tenora_kernels.reference import add_lora_reference
from tests.kernels.cases import GATE_UP, LAYOUTS, MIXED, QKV, TOLERANCE, make_case, make_tables, shuffled, worst

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def odd_tables(
    rank: int, columns: int, widths: tuple[int, ...], dtype: torch.dtype, *, train: bool = False
) -> tuple[LoraTables, LoraSite]:
    """One slot of one rank at a site of any size, with random weights."""
    values = rank * sum(columns + width for width in widths)
    generator = torch.Generator().manual_seed(rank + columns)
    arena = torch.randn(values, generator=generator).mul_(0.2).to(dtype)
    tables = LoraTables.empty(
        arena,
        in_features=[columns] * len(widths),
        out_features=widths,
        slots=1,
        grad=torch.zeros(values) if train else None,
    )
    tables.place(0, 0, [rank] * len(widths), [0.7] * len(widths))
    ends = [sum(widths[: j + 1]) for j in range(len(widths))]
    return tables, LoraSite(0, columns, tuple((end - width, end) for end, width in zip(ends, widths, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("site", [QKV, GATE_UP], ids=["qkv", "gate_up"])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(site: LoraSite, is_bf16: bool, dtype: torch.dtype) -> None:
    if is_bf16 and dtype != torch.float32:
        pytest.skip("only a float32 arena has bfloat16 slots")
    slots = shuffled(90, 7, 7)
    case = make_case(slots, MIXED, site=site, dtype=dtype, is_bf16=is_bf16)
    whole = case.y.clone()
    lora.forward(whole, case.x, site, case.batch)
    for chosen in ([0, 1], [5], list(range(0, 90, 2)), list(range(89, -1, -1)), list(range(40, 60))):
        part = case.y[chosen]
        lora.forward(part, case.x[chosen], site, LoraBatch(case.tables, build_segments([slots[t] for t in chosen])))
        assert torch.equal(part, whole[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_length_of_its_segment(dtype: torch.dtype) -> None:
    """Tiles of one, two and three rows, blocks of any number: every length once."""
    case = make_case([5] * 60, MIXED, dtype=dtype)
    whole = case.y.clone()
    lora.forward(whole, case.x, QKV, case.batch)
    for count in range(1, 60):
        part = case.y[:count].clone()
        lora.forward(part, case.x[:count], QKV, LoraBatch(case.tables, build_segments([5] * count)))
        assert torch.equal(part, whole[:count])


@pytest.mark.parametrize("layout", ["long segments", "the largest for all"])
def test_threads_change_no_bit(layout: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, ranks = LAYOUTS[layout]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        case = make_case(slots, ranks, train=True)
        lora.forward(case.y, case.x, QKV, case.batch)
        dx = torch.zeros_like(case.x)
        lora.backward(case.y, case.x, QKV, case.batch, dx)
        results.append((case.y, dx, case.tables.grad))
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert torch.equal(got, wanted)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    rank=st.integers(1, 20),
    columns=st.integers(1, 70),
    widths=st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size_equals_the_reference(
    rows: int, rank: int, columns: int, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """No size needs to be a multiple of a vector."""
    tables, site = odd_tables(rank, columns, widths, dtype, train=True)
    x, dy = torch.randn(rows, columns).to(dtype), torch.randn(rows, sum(widths)).to(dtype)
    y = torch.randn(rows, sum(widths)).to(dtype)
    batch = LoraBatch(tables, build_segments([0] * rows))
    wanted = add_lora_reference(y, x, site, tables, [0] * rows)
    lora.forward(y, x, site, batch)
    assert worst(y, wanted) <= TOLERANCE[dtype]
    expected, dx = torch.zeros(rows, columns), torch.zeros(rows, columns)
    torch_backend.backward(dy, x, site, batch, expected)
    assert tables.grad is not None
    expected_grad = tables.grad.clone()
    tables.grad.zero_()
    lora.backward(dy, x, site, batch, dx)
    assert worst(dx, expected) <= 2 * TOLERANCE[torch.float32]
    assert worst(tables.grad, expected_grad) <= 2 * TOLERANCE[torch.float32]


def test_a_rank_beyond_the_scratch() -> None:
    rank = lora_blocks.STACK_FLOATS + 5
    tables, site = odd_tables(rank, 8, (8,), torch.float32)
    tables.arena.mul_(0.1)
    x, y = torch.randn(3, 8), torch.zeros(3, 8)
    wanted = add_lora_reference(y, x, site, tables, [0] * 3)
    lora.forward(y, x, site, LoraBatch(tables, build_segments([0] * 3)))
    assert worst(y, wanted) <= 10 * TOLERANCE[torch.float32]


def test_no_write_outside_the_rows_and_columns_of_an_adapter() -> None:
    """Tiles and vectors end where the matrix ends: what lies behind is never written, and never summed."""
    tables, site = odd_tables(3, 11, (13,), torch.float32)
    x = torch.full((6, 20), float("nan"))
    x[:, :11] = torch.randn(6, 11)
    y = torch.full((6, 30), 7.0)
    wanted = add_lora_reference(y[:, :13], x[:, :11], site, tables, [0, -1, 0, 0, -1, 0])
    lora.forward(y, x[:, :11], site, LoraBatch(tables, build_segments([0, -1, 0, 0, -1, 0])))
    assert worst(y[:, :13], wanted) <= TOLERANCE[torch.float32]
    assert (y[:, 13:] == 7).all()
    assert (y[[1, 4]] == 7).all()


def test_what_it_takes() -> None:
    float32, half = make_tables(MIXED, torch.float32), make_tables(MIXED, torch.float16)
    x, y = torch.zeros(2, 48), torch.zeros(2, 80)
    assert lora.supports(y, x, float32)
    assert lora.supports(y.bfloat16(), x.bfloat16(), make_tables(MIXED, torch.bfloat16))
    assert not lora.supports(y, x.bfloat16(), float32)
    assert not lora.supports(y.double(), x.double(), float32)
    assert not lora.supports(y, x, half)
    assert not lora.supports(torch.zeros(80, 2).t(), x, float32)
    assert not lora.supports(y.to("meta"), x.to("meta"), float32)


def test_works_where_no_cache_can_be_written(tmp_path: Path, repo_root: Path) -> None:
    """A read-only installation run by a user without a home: it compiles for itself, and is right."""
    program = textwrap.dedent("""
        import torch
        from numba.core import caching

        # What Numba finds where neither the package's folder nor the user's can be written.
        caching.CacheImpl._locator_classes = []
        from tenora_kernels.cpu.lowrank import lora
        from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables, build_segments

        tables = LoraTables.empty(torch.ones(4), in_features=(2,), out_features=(2,), slots=1)
        tables.place(0, 0, [1], [2.0])
        y = torch.zeros(1, 2)
        lora.forward(y, torch.ones(1, 2), LoraSite(0, 2, ((0, 2),)), LoraBatch(tables, build_segments([0])))
        print(y.tolist())
    """)
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(repo_root / "kernels"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.stdout.strip() == "[[4.0, 4.0]]", result.stderr
