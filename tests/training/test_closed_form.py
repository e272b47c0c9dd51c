"""Heads in closed form, compared with scikit-learn's on the same features."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from tenora.training.closed_form import Basis, Link, at_once, logistic, losses_of, ridge


def features(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Correlated, of very different scales and far from zero, as hidden states are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, columns)) @ rng.normal(size=(columns, columns)) / columns**0.5
    return (mixed * rng.lognormal(sigma=2, size=columns) + rng.normal(size=columns) * 10).astype(np.float32)


def classes(x: np.ndarray, count: int) -> np.ndarray:
    """A class of each row that its features tell about, and some noise."""
    rng = np.random.default_rng(1)
    seen = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(x.shape[1], count)) / x.shape[1] ** 0.5
    found: np.ndarray = (seen + rng.normal(size=seen.shape)).argmax(1)
    return found


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("rows", "columns", "count"), [(60, 90, 3), (200, 20, 5), (80, 40, 2)])
def test_a_logistic_head_is_scikit_learns(rows: int, columns: int, count: int, strength: float) -> None:
    x = features(rows, columns)
    label = classes(x, count)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=20_000).fit(
        scaler.transform(x.astype(np.float64)), label
    )
    link: Link = "sigmoid" if count == 2 else "softmax"
    targets = label[:, None].astype(float) if count == 2 else np.eye(count)[label]
    basis = Basis.of(x)
    head = basis.unfold(*at_once(logistic(basis.rows, targets, strength, link, tolerance=1e-9)))
    scores = head(x)
    likely = 1 / (1 + np.exp(-scores)) if count == 2 else np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = theirs.predict_proba(scaler.transform(x.astype(np.float64)))
    np.testing.assert_allclose(likely, expected[:, 1:] if count == 2 else expected, atol=1e-5)


def test_labels_that_do_not_exclude_each_other_are_learned_one_by_one() -> None:
    x = features(70, 30)
    targets = np.random.default_rng(2).integers(0, 2, (70, 4)).astype(float)
    targets[:, 3] = 1.0  # every row has it, so no bias is large enough
    scaled = StandardScaler().fit_transform(x.astype(np.float64))
    basis = Basis.of(x)
    head = basis.unfold(*at_once(logistic(basis.rows, targets, 0.1, "sigmoid", tolerance=1e-9)))
    for label in range(3):
        theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=20_000).fit(scaled, targets[:, label])
        np.testing.assert_allclose(head(x)[:, label], theirs.decision_function(scaled), atol=1e-4)
    np.testing.assert_allclose(head(x)[:, 3], np.log(70.5 / 0.5))


@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (200, 15)])
def test_a_ridge_head_is_scikit_learns(rows: int, columns: int) -> None:
    x, rng = features(rows, columns), np.random.default_rng(3)
    y = rng.normal(size=(rows, 1)) + 5
    scaled, basis = StandardScaler().fit_transform(x.astype(np.float64)), Basis.of(x)
    strengths = np.array([1e-3, 1.0, 30.0])
    for strength, head in zip(strengths, ridge(basis.rows, y, strengths), strict=True):
        theirs = Ridge(alpha=1 / strength).fit(scaled, y)
        np.testing.assert_allclose(basis.unfold(*head)(x)[:, 0], theirs.predict(scaled).ravel(), atol=1e-6)


def test_a_start_at_another_strength_changes_nothing_but_the_way() -> None:
    x = features(60, 90)
    basis, targets = Basis.of(x), np.eye(3)[classes(x, 3)]
    start = at_once(logistic(basis.rows, targets, 0.01, "softmax"))
    cold, warm = (
        at_once(logistic(basis.rows, targets, 1.0, "softmax", start=s, tolerance=1e-9)) for s in (None, start)
    )
    np.testing.assert_allclose(cold[0], warm[0], atol=1e-6)


@pytest.mark.parametrize("link", ["softmax", "sigmoid", "identity"])
def test_losses_of_large_scores_are_finite(link: Link) -> None:
    scores, targets = np.array([[900.0, -900.0]]), np.array([[0.0, 1.0]])
    assert np.isfinite(losses_of(scores, targets, link)).all()
