"""Paged attention of the CPU against float64, for every family's shape, in every mix of chunks and decode rows.

Tolerances: float32 5e-6 (values are around 1; sums of 200 terms), bfloat16 one unit in the last place of the result.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenora.model.decoder import RMSNorm
from tenora.model.rotary import rotate
from tenora_kernels.cpu.attention import attention
from tenora_kernels.cpu.attention.attention import PagedStep, Rope, allocate_cache, supports
from tenora_kernels.cpu.runtime.team import Team
from tests.kernels.paged_cases import PagedCase, Schedule, Shape, reference, token_by_token, whole
from tests.support.full import full_but

SHAPES = {
    "smollm2": Shape(9, 3, 64),
    "qwen2": Shape(14, 2, 64),
    "qwen3": Shape(16, 8, 128),
    "phi, no groups": Shape(4, 4, 80),
    "mistral": Shape(8, 2, 96),
    "one head, an odd size": Shape(1, 1, 24),
    "one group of 16": Shape(16, 1, 8),
}
LENGTHS = [150, 70, 33]
MIXED: Schedule = [
    [(0, 100), (2, 1), (1, 3)],
    [(1, 40), (0, 1), (2, 20)],
    [(2, 12), (0, 48)],
    *([(1, 1), (0, 1)] for _ in range(1)),
    *([(1, 1)] for _ in range(26)),
]


@pytest.fixture(name="team", scope="module")
def _team() -> Team:
    return Team(2)


@pytest.fixture(autouse=True)
def _wake_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps, too, are shared where a test gives a team."""
    monkeypatch.setattr(attention, "_ALONE_WORK", 0)


def assert_near(actual: list[Tensor], expected: list[Tensor]) -> None:
    for rows, wanted in zip(actual, expected, strict=True):
        is_bf16 = rows.dtype == torch.bfloat16
        torch.testing.assert_close(
            rows.double(), wanted, atol=1e-5 if is_bf16 else 5e-6, rtol=2**-8 if is_bf16 else 0.0, equal_nan=False
        )


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(rows, wanted) for rows, wanted in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", full_but(["smollm2", "one head, an odd size", "one group of 16"], SHAPES))
def test_every_shape_in_every_order(name: str, dtype: torch.dtype, team: Team) -> None:
    shape = SHAPES[name]
    for window in (None, 1, 7, 100):
        first = PagedCase(shape, LENGTHS, dtype=dtype).run(whole(LENGTHS), window)
        assert_near(first, PagedCase(shape, LENGTHS, dtype=dtype).expected(window))
        # The same bits in chunks and as decode rows, on one thread and on two.
        assert_same_bits(PagedCase(shape, LENGTHS, dtype=dtype).run(MIXED, window, team=team), first)


@pytest.mark.parametrize("block_size", [1, 4, 5, 16, 32, 48])
def test_any_block_size_gives_the_same_bits(block_size: int, team: Team) -> None:
    shape = SHAPES["smollm2"]
    expected = PagedCase(shape, LENGTHS).run(whole(LENGTHS), 40)
    assert_near(expected, PagedCase(shape, LENGTHS).expected(40))
    for schedule in (whole(LENGTHS), MIXED, token_by_token(LENGTHS)):
        case = PagedCase(shape, LENGTHS, block_size=block_size)
        assert_same_bits(case.run(schedule, 40, team=team), expected)


def test_a_row_does_not_depend_on_its_batch(team: Team) -> None:
    lengths = [17, 130, 64, 65, 1, 200]
    shape = SHAPES["smollm2"]
    together = PagedCase(shape, lengths).run(token_by_token(lengths), team=team)
    for sequence, length in enumerate(lengths):
        alone = PagedCase(shape, lengths).run([[(sequence, 1)]] * length)
        assert torch.equal(alone[sequence], together[sequence])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_schedule_gives_the_same_bits(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=4))
    window = data.draw(st.sampled_from([None, 1, 16, 65]))
    left, schedule = list(lengths), []
    while any(left):
        active = [sequence for sequence, rest in enumerate(left) if rest]
        chosen = data.draw(st.lists(st.sampled_from(active), min_size=1, unique=True))
        work = [(sequence, data.draw(st.integers(1, left[sequence]))) for sequence in chosen]
        for sequence, count in work:
            left[sequence] -= count
        schedule.append(work)
    shape = Shape(6, 2, 16)
    expected = PagedCase(shape, lengths).run(whole(lengths), window)
    assert_near(expected, PagedCase(shape, lengths).expected(window))
    assert_same_bits(PagedCase(shape, lengths).run(schedule, window), expected)


def turned(case: PagedCase, tables: list[Rope], weight: Tensor | None) -> list[Tensor]:
    """The case's sequences as torch's modules turn them."""
    both = case.shape.heads + case.shape.kv_heads
    rows = []
    for sequence, rope in zip(case.sequences, tables, strict=True):
        qk, v = torch.split(sequence, [both, case.shape.kv_heads], dim=1)
        if weight is not None:
            norm = RMSNorm(tuple(weight.shape), 1e-6, dtype=weight.dtype)
            norm.weight.data.copy_(weight)
            qk = norm(qk)
        rows.append(torch.cat((rotate(qk, *rope), v), dim=1))
    return rows


def random_tables(case: PagedCase) -> list[Rope]:
    generator = torch.Generator().manual_seed(5)
    tables = []
    for sequence in case.sequences:
        angles = torch.rand(len(sequence), case.shape.dim, generator=generator) * 6
        tables.append(Rope(angles.cos().to(sequence.dtype), angles.sin().to(sequence.dtype)))
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_rotation_equals_torch_to_the_bit(dtype: torch.dtype) -> None:
    case = PagedCase(SHAPES["smollm2"], LENGTHS, dtype=dtype)
    tables = random_tables(case)
    rows = turned(case, tables, None)
    assert_near(case.run(MIXED, tables=tables), [reference(sequence, case.shape, None) for sequence in rows])
    for sequence, values in enumerate(rows):
        keys = values[:, case.shape.heads : -case.shape.kv_heads]
        for position in range(len(values)):
            block, offset = divmod(case.slot(sequence, position), case.block_size)
            assert torch.equal(case.cache[0][block, offset], keys[position])
            assert torch.equal(case.cache[1][block, offset], values[position, -case.shape.kv_heads :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_norm_of_q_and_k(dtype: torch.dtype) -> None:
    case = PagedCase(SHAPES["qwen3"], LENGTHS, dtype=dtype)
    tables = random_tables(case)
    weight = (torch.rand(24, 128, generator=torch.Generator().manual_seed(6)) + 0.5).to(dtype)
    rows = turned(case, tables, weight)
    actual = case.run(MIXED, tables=tables, norm=weight)
    expected = [reference(sequence, case.shape, None) for sequence in rows]
    if dtype == torch.float32:
        assert_near(actual, expected)
    else:  # the sum of squares in another order may turn a rounding of q or k
        for part, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(part.double(), wanted, atol=5e-3, rtol=2**-7)


def test_equal_bits_on_repeat(team: Team) -> None:
    runs = [PagedCase(SHAPES["qwen2"], LENGTHS).run(MIXED, team=team) for _ in range(3)]
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


def test_scores_of_any_size() -> None:
    """Scores of ± 3,000: the largest wins, nothing overflows."""
    case = PagedCase(Shape(3, 1, 64), [90])
    case.sequences[0][:, :4] *= 30
    (rows,), (wanted,) = case.run(whole([90])), case.expected()
    # A score of 3,000 is rounded by up to 1e-4, and its weight by as much.
    torch.testing.assert_close(rows.double(), wanted, atol=1e-3, rtol=0)


def test_what_is_not_finite_stays_so() -> None:
    case = PagedCase(Shape(3, 1, 64), [40])
    case.sequences[0][20, 1, 3] = float("nan")  # head 1 of query 20
    case.sequences[0][30, 3, 5] = float("nan")  # the key of position 30
    (rows,) = case.run(whole([40]))
    bad = ~rows.view(40, 3, 64).isfinite().all(-1)
    assert bad[20].tolist() == [False, True, False]
    assert not bad[:20].any()
    assert bad[30:].all()


MUTATIONS = ["window + 1", "window - 1", "another block", "keys of another head", "a later rotation", "a value lost"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation: str) -> None:
    shape, window = Shape(6, 2, 16), 37
    case = PagedCase(shape, [100, 90])
    tables = random_tables(case)
    expected = [reference(rows, shape, window) for rows in turned(case, tables, None)]
    case.run([[(0, 80), (1, 70)]], window, tables=tables)
    if mutation == "another block":
        case.tables[0, 3] = case.tables[1, 3]
    elif mutation == "keys of another head":
        case.cache[0][case.tables[0, 3]] = case.cache[0][case.tables[0, 3]].flip(1)
    elif mutation == "a value lost":
        case.cache[1][case.tables[0, 4], 15] = 0.0
    shift = 1 if mutation == "a later rotation" else 0
    seen = {"window + 1": window + 1, "window - 1": window - 1}.get(mutation, window)
    slots = [case.slot(0, 80)]
    step = PagedStep(slots, [0, 1], [81], case.tables[:1])
    q, k, v = torch.split(case.sequences[0][80:81], [6, 2, 2], dim=1)
    rope = Rope(*(table[80 + shift : 81 + shift] for table in tables[0]))
    out = step.attend(q, k, v, case.cache, seen, rope=rope)
    assert (out.double() - expected[0][80]).abs().max() > 1e-4


def test_no_tokens_and_layouts_that_have_to_be_copied() -> None:
    cache = allocate_cache(2, 16, 1, 8, torch.float32)
    empty = PagedStep([], [0], [], np.zeros((0, 0)))
    q, k, v = torch.zeros(0, 2, 8), torch.zeros(0, 1, 8), torch.zeros(0, 1, 8)
    assert empty.attend(q, k, v, cache, None).shape == (0, 16)
    q, k, v = torch.randn(8, 2, 20).transpose(0, 2), torch.randn(20, 1, 8), torch.randn(20, 2, 8)[:, 1:]
    step = PagedStep(np.arange(20), [0, 20], [20], [[0, 1]])
    rows = torch.cat((q, k, v), dim=1)
    assert_near([step.attend(q, k, v, cache, None)], [reference(rows, Shape(2, 1, 8), None)])


def test_refusals() -> None:
    assert supports(torch.float32, 80)
    assert not supports(torch.float16, 64)
    assert not supports(torch.float32, 12)
    step = PagedStep([0], [0, 1], [1], [[0]])
    q, k, v = torch.zeros(1, 2, 8), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="all be float32 or all bfloat16"):
        step.attend(q, k, v, allocate_cache(1, 16, 1, 8, torch.bfloat16), None)
    cache = allocate_cache(1, 16, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        step.attend(q, k, v, cache, None, rope=Rope(torch.zeros(1, 16)[:, ::2], torch.zeros(1, 8)))
