"""The sampler against transformers' processors and against exact distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tenora.engine import sampler
from tenora.engine.messages import SamplingParams
from tenora.engine.sampler import sample, uniform
from tenora.engine.sequence import SequenceState
from tests.engine.requests import sampling, sequence

VOCAB = 520  # more than one block of the two-level draw, and more than the candidates
DRAWS = 8000


def logits_for(rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits: Tensor, params: Callable[[int], SamplingParams], count: int) -> Counter[int]:
    """Tokens of one distribution [vocab] drawn with seeds 0 … count - 1, in batches."""
    found: Counter[int] = Counter()
    for start in range(0, count, 1000):
        rows = [sequence([1], params(seed)) for seed in range(start, min(start + 1000, count))]
        found.update(sample(logits.repeat(len(rows), 1), rows).token_ids)
    return found


def expected(logits: Tensor, **given: Any) -> Tensor:
    """The distribution that transformers' warpers leave, in their order."""
    warpers = transformers.LogitsProcessorList()
    if "temperature" in given:
        warpers.append(transformers.TemperatureLogitsWarper(given["temperature"]))
    if "top_k" in given:
        warpers.append(transformers.TopKLogitsWarper(given["top_k"]))
    if "top_p" in given:
        warpers.append(transformers.TopPLogitsWarper(given["top_p"]))
    if "min_p" in given:
        warpers.append(transformers.MinPLogitsWarper(given["min_p"]))
    return torch.softmax(warpers(torch.tensor([[1]]), logits[None].clone())[0], dim=-1)


def chi_square(found: Counter[int], probabilities: Tensor, count: int) -> float:
    """The statistic's distance from its mean in standard deviations; rare tokens are pooled."""
    assert all(probabilities[token] > 0 for token in found), "a token outside of the allowed set was drawn"
    common = [token for token in range(len(probabilities)) if probabilities[token] * count >= 8]
    pooled = 1.0 - sum(float(probabilities[token]) for token in common)
    cells = [(found[token], float(probabilities[token]) * count) for token in common]
    if pooled * count >= 8:
        cells.append((count - sum(observed for observed, _ in cells), pooled * count))
    statistic = sum((observed - mean) ** 2 / mean for observed, mean in cells)
    degrees = len(cells) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_k": 400},  # more than the candidates: the whole vocabulary is sorted
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 4.0, "top_p": 0.95},  # flat: the candidates do not hold the mass
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 3.0, "top_k": 500, "top_p": 0.9},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_distribution_of_transformers(filters: dict[str, Any]) -> None:
    logits = logits_for(1)[0]
    found = draws(logits, lambda seed: sampling(**{"temperature": 1.0, **filters}, seed=seed), DRAWS)
    assert chi_square(found, expected(logits, **filters), DRAWS) < 5


def test_the_chi_square_check_can_fail() -> None:
    logits = logits_for(1)[0]
    found = draws(logits, lambda seed: sampling(temperature=1.2, seed=seed), DRAWS)
    assert chi_square(found, expected(logits, temperature=1.0), DRAWS) > 8


@pytest.mark.parametrize("filters", FILTERS[2:], ids=str)
def test_the_kept_set_is_that_of_transformers(filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk the noise over a fine grid: every token that may be drawn is drawn, and no other one."""
    logits = logits_for(1, scale=1.0)[0]
    kept = expected(logits, **filters)
    grid = 10_000
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / grid)
    found = draws(logits, lambda seed: sampling(**filters, seed=seed), grid)
    assert set((kept * grid > 1).nonzero().flatten().tolist()) <= set(found)
    assert set(found) <= set(kept.nonzero().flatten().tolist())
    for token, times in found.items():  # inverse CDF on a grid: exact up to the cell at each end
        assert times == pytest.approx(float(kept[token]) * grid, abs=2)


def test_penalties_equal_those_of_transformers_and_of_the_openai_formula() -> None:
    logits = logits_for(1)
    row = sequence([5, 6, 6], sampling(repetition_penalty=1.4), output=[7, 7, 9])
    hf = transformers.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([row.token_ids]), logits.clone())
    mine = sampler._penalise(logits.clone(), [row])
    torch.testing.assert_close(mine, hf)
    row = sequence([5, 6, 6], sampling(frequency_penalty=0.5, presence_penalty=0.25), output=[7, 7, 9])
    mine = sampler._penalise(logits.clone(), [row])
    want = logits.clone()
    want[0, 7] -= 2 * 0.5 + 0.25
    want[0, 9] -= 0.5 + 0.25
    torch.testing.assert_close(mine, want)


def test_processors_act_on_greedy_rows_before_the_arg_max() -> None:
    logits = torch.zeros(4, 10)
    logits[:, 3] = 2.0
    logits[:, 4] = 1.5
    rows = [
        sequence([1], sampling()),
        sequence([1], sampling(logit_bias={3: -1.0})),
        sequence([1], sampling(presence_penalty=1.0), output=[3]),
        sequence([1], sampling(min_tokens=2, stop_token_ids=(3, 4), logit_bias={9: 0.5}), output=[0]),
    ]
    assert sample(logits, rows).token_ids == [3, 4, 4, 9]
    rows[3].token_ids.append(0)
    logits = torch.zeros(1, 10)
    logits[0, 3] = 2.0
    assert sample(logits, rows[3:]).token_ids == [3]  # long enough to end


def test_a_row_never_depends_on_its_neighbours() -> None:
    kinds: list[dict[str, Any]] = [*FILTERS, {"temperature": 0.0}, {"temperature": 1.0, "repetition_penalty": 1.3}]
    rows = [
        sequence([1, 2], sampling(**{"temperature": 1.0, **kind}, seed=seed), output=[3])
        for seed in range(3)
        for kind in kinds
    ]
    logits = logits_for(len(rows))
    together = sample(logits.clone(), rows).token_ids
    alone = [sample(logits[i : i + 1].clone(), [row]).token_ids[0] for i, row in enumerate(rows)]
    assert together == alone
    assert sample(logits.flip(0).clone(), rows[::-1]).token_ids == together[::-1]


def test_the_positions_of_one_seeded_request_draw_independently() -> None:
    logits = logits_for(1)[0]
    rows = [sequence([1], sampling(temperature=1.0, seed=3), output=[0] * position) for position in range(2000)]
    found = Counter(sample(logits.repeat(len(rows), 1), rows).token_ids)
    assert chi_square(found, expected(logits), len(rows)) < 5


def test_noise_depends_on_seed_and_position_alone() -> None:
    values = [uniform(seed, position) for seed in (0, 1, -1, 2**63) for position in range(2500)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    assert uniform(3, 4) == uniform(3, 4)
    counts = torch.histc(torch.tensor(values), bins=50, min=0, max=1)
    assert ((counts - 200) ** 2 / 200).sum() < 49 + 5 * math.sqrt(2 * 49)


def test_without_a_seed_two_requests_draw_differently() -> None:
    rows = [sequence([1], sampling(temperature=5.0)) for _ in range(8)]
    assert len(set(sample(logits_for(1).repeat(8, 1), rows).token_ids)) > 1


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-52])
@pytest.mark.parametrize("given", [{}, {"top_k": 9}, {"top_p": 0.5}], ids=str)
def test_the_ends_of_the_noise_never_reach_an_impossible_token(
    noise: float, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: noise)
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 300:310] = torch.randn(10)
    (token,) = sample(logits, [sequence([1], sampling(temperature=0.7, **given))]).token_ids
    assert 300 <= token < 310


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_logits_that_are_not_finite_are_told_and_harm_no_other_row(given: dict[str, Any]) -> None:
    logits = logits_for(4)
    clean = sample(logits.clone(), [sequence([1], sampling(**given, seed=5)) for _ in range(4)]).token_ids
    logits[1, 17] = torch.nan
    logits[2] = -torch.inf
    tokens = sample(logits, [sequence([1], sampling(**given, seed=5)) for _ in range(4)]).token_ids
    assert tokens == [clean[0], -1, -1, clean[3]]


@pytest.mark.parametrize("width", sampler.CANDIDATES)
def test_the_largest_are_those_of_a_stable_sort(width: int) -> None:
    logits = (logits_for(9, vocab=width * 12 + 5) * 4).round()  # many are equal
    logits[1] = -torch.inf
    logits[1, 40:50] = torch.arange(10.0)
    logits[2] = 1.0
    logits[3, width] = torch.inf
    logits[4, ::2] = -torch.inf
    want, want_ids = logits.sort(dim=-1, descending=True, stable=True)
    values, ids = sampler._largest(logits, width)
    assert torch.equal(values, want[:, :width])
    possible = values > -torch.inf
    assert torch.equal(ids[possible], want_ids[:, :width][possible])


@pytest.mark.parametrize("given", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 1000}], ids=str)
def test_one_nan_in_a_large_vocabulary_is_found(given: dict[str, Any]) -> None:
    logits = logits_for(3, vocab=5000)
    rows = [sequence([1], sampling(temperature=1.0, seed=5, **given)) for _ in range(3)]
    clean = sample(logits.clone(), rows).token_ids
    logits[1, 4321] = torch.nan
    assert sample(logits, rows).token_ids == [clean[0], -1, clean[2]]


def test_of_equal_logits_the_first_is_taken() -> None:
    logits = torch.zeros(3, 50)
    logits[1, [7, 9]] = 2.0
    logits[2, 3] = torch.inf
    assert sample(logits, [sequence([1])] * 3).token_ids == [0, 7, -1]


def test_penalties_of_several_rows_touch_what_occurs_in_each() -> None:
    logits = logits_for(3)
    rows = [
        sequence([5, 6], sampling(repetition_penalty=1.5), output=[7]),
        sequence([8], sampling(frequency_penalty=1.0), output=[9, 9]),
        sequence([8], sampling(presence_penalty=1.0)),
    ]
    changed = sampler._penalise(logits.clone(), rows) != logits
    assert [row.nonzero().flatten().tolist() for row in changed] == [[5, 6, 7], [9], []]


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"logit_bias": {3: 1.0}},
        {"logprobs": 0},
        {"min_tokens": 1, "stop_token_ids": (3,)},
    ],
    ids=str,
)
def test_only_rows_without_any_wish_are_plain(given: dict[str, Any]) -> None:
    assert sequence([1]).plain
    assert sequence([1], sampling(min_tokens=1)).plain, "nothing is forbidden without stop tokens"
    made = sequence([1], sampling(**given))
    assert not made.plain
    assert made.greedy == ("temperature" not in given)


def test_log_probabilities_are_the_models_own() -> None:
    logits = logits_for(3)
    want = torch.log_softmax(logits, dim=-1)
    rows: list[SequenceState] = [
        sequence([1], sampling(logprobs=2, logit_bias={11: 100.0}, repetition_penalty=1.5)),
        sequence([1], sampling()),
        sequence([1], sampling(temperature=0.2, seed=1, top_k=3, logprobs=0)),
    ]
    sampled = sample(logits.clone(), rows)
    assert sampled.token_ids[0] == 11
    first, second, third = sampled.logprobs
    assert first is not None
    assert third is not None
    assert second is None
    assert first.logprob == pytest.approx(float(want[0, 11]), abs=1e-5)
    best = want[0].topk(2)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert third.top == ()
    assert third.logprob == pytest.approx(float(want[2, third.token_id]), abs=1e-5)


def test_greedy_rows_draw_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(seed: int, position: int) -> float:
        raise AssertionError("a greedy row drew noise")

    monkeypatch.setattr(sampler, "uniform", forbidden)
    logits = logits_for(2)
    assert sample(logits, [sequence([1]), sequence([1])]).token_ids == logits.argmax(dim=-1).tolist()
