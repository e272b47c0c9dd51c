"""Recipes: what differs for few rows and for preferences."""

from __future__ import annotations

import math

import pytest

from tenora.errors import InvalidRequestError
from tenora.training.methods.table import METHODS
from tenora.training.recipes import (
    FEW_SHOT_ROWS,
    cross_validation_folds,
    halving_rungs,
    is_few_shot,
    resolve_hyperparameters,
)


def test_few_rows_get_more_epochs_and_smaller_batches() -> None:
    for rows in (2, 5, 10, 20, 49):
        few, plain = (resolve_hyperparameters(rows, 80 * rows, {}, few_shot=yes) for yes in (True, False))
        assert few.n_epochs > plain.n_epochs
        assert few.batch_size <= plain.batch_size
        assert few.n_epochs * math.ceil(rows / few.batch_size) >= 8
        assert few.learning_rate == plain.learning_rate
    asked = resolve_hyperparameters(10, 800, {"n_epochs": 2, "batch_size": 5}, few_shot=True)
    assert (asked.n_epochs, asked.batch_size) == (2, 5)


def test_folds_have_rows() -> None:
    assert [cross_validation_folds(rows) for rows in (2, 3, 5, 49)] == [2, 3, 5, 5]


@pytest.mark.parametrize(
    ("rows", "method", "tasks", "validation", "sweeps", "few"),
    [
        (FEW_SHOT_ROWS - 1, "supervised", 1, False, False, True),
        (FEW_SHOT_ROWS, "supervised", 1, False, False, False),
        (10, "supervised", 1, True, False, False),
        (10, "supervised", 2, False, False, False),
        (10, "supervised", 1, False, True, False),
        (10, "dpo", 1, False, False, False),
    ],
)
def test_when_rows_are_few(rows: int, method: str, tasks: int, validation: bool, sweeps: bool, few: bool) -> None:
    assert is_few_shot(rows, method=METHODS[method], tasks=tasks, has_validation=validation, sweeps=sweeps) is few


def test_preferences_start_at_a_tenth_of_the_rate() -> None:
    for rows in (20, 200, 5_000):
        usual, found = (
            resolve_hyperparameters(rows, 80 * rows, {}, method=METHODS[method]) for method in ("supervised", "dpo")
        )
        assert found.learning_rate == pytest.approx(usual.learning_rate / 10)
        assert found.n_epochs <= 2
        assert (found.own["beta"], found.learning_rate_multiplier) == (0.1, 1.0)
    asked = resolve_hyperparameters(20, 800, {"beta": 0.5, "learning_rate_multiplier": 2}, method=METHODS["dpo"])
    assert (asked.own["beta"], asked.learning_rate) == (0.5, 1e-4)
    assert resolve_hyperparameters(20, 800, {"beta": "auto"}, method=METHODS["dpo"]).own["beta"] == 0.1
    for beta in (0, -1, 11, math.inf, "much"):
        with pytest.raises(InvalidRequestError) as caught:
            resolve_hyperparameters(20, 800, {"beta": beta}, method=METHODS["dpo"])
        assert caught.value.param == "beta"


@pytest.mark.parametrize("trials", range(1, 65))
def test_halving_always_ends_with_one_run_to_the_end(trials: int) -> None:
    rungs = halving_rungs(trials)
    shares, survivors = zip(*rungs, strict=True)
    assert shares[-1] == 1.0
    assert list(shares) == sorted(set(shares))
    assert list(survivors) == sorted(survivors, reverse=True)
    assert 1 <= survivors[-1] <= max(1, trials // 3)
