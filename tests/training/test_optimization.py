"""AdamW, clipping and the schedule equal torch's and transformers'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from tenora.errors import InvalidRequestError
from tenora.training.commands import AdamWSettings
from tenora.training.optimizer import AdamW, clip_grad_norm
from tenora.training.recipes import held_out_fraction, resolve_hyperparameters
from tenora.training.schedule import learning_rate, warmup_steps
from tenora.training.settings import Scheduler


@dataclass
class Vector:
    weights: torch.Tensor
    grad: torch.Tensor
    refreshed: torch.Tensor | None = None

    def refresh(self) -> None:
        self.refreshed = self.weights.clone()


def _rates(weight_decay: float) -> list[AdamWSettings]:
    return [AdamWSettings(learning_rate=1e-2 / (step + 1), weight_decay=weight_decay) for step in range(20)]


MOMENTS = [AdamWSettings(learning_rate=1e-2, beta1=0.8, beta2=0.95, epsilon=1e-12)] * 20
CHANGING = [
    AdamWSettings(
        learning_rate=1e-2, weight_decay=0.05, beta1=0.95 - 0.03 * step, beta2=0.9 + 0.004 * step, epsilon=eps
    )
    for step, eps in enumerate([1e-4, 1e-8] * 10)
]


@pytest.mark.parametrize("course", [_rates(0.0), _rates(0.1), MOMENTS, CHANGING])
def test_adamw_equals_torch_with_settings_of_every_steps_own(course: list[AdamWSettings]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], lr=1.0, foreach=False)
    parameters = Vector(start.clone(), torch.zeros(300))
    ours = AdamW(parameters)
    for settings in course:
        theirs.grad = torch.randn(300, generator=generator)
        parameters.grad.copy_(theirs.grad)
        betas = (settings.beta1, settings.beta2)
        reference.param_groups[0].update(
            lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=betas, eps=settings.epsilon
        )
        reference.step()
        ours.step(settings)
    torch.testing.assert_close(parameters.weights, theirs.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.exp_avg_sq, reference.state[theirs]["exp_avg_sq"], rtol=1e-6, atol=0)
    assert parameters.refreshed is not None
    assert torch.equal(parameters.refreshed, parameters.weights), "it is told of the weights as they are at the end"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_stretches_with_a_rate_of_their_own_equal_torchs_parameter_groups(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=generator)
    theirs = [torch.nn.Parameter(part.clone()) for part in start.split([100, 120, 80])]
    factors = (1.0, 10.0, 0.5)
    groups = [{"params": [part], "lr": 1e-3 * factor} for part, factor in zip(theirs, factors, strict=True)]
    reference = torch.optim.AdamW(groups, weight_decay=weight_decay, foreach=False)
    parameters = Vector(start.clone(), torch.zeros(300))
    spans = (slice(0, 100), slice(100, 220), slice(220, 300))
    ours = AdamW(parameters, tuple(zip(spans, factors, strict=True)))
    for _ in range(10):
        grad = torch.randn(300, generator=generator)
        parameters.grad.copy_(grad)
        for part, own in zip(theirs, grad.split([100, 120, 80]), strict=True):
            part.grad = own.clone()
        reference.step()
        ours.step(AdamWSettings(learning_rate=1e-3, weight_decay=weight_decay))
    torch.testing.assert_close(parameters.weights, torch.cat([part.detach() for part in theirs]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clipping_equals_torch(max_norm: float) -> None:
    grad = torch.randn(100, generator=torch.Generator().manual_seed(1))
    theirs = torch.nn.Parameter(torch.zeros(100))
    theirs.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([theirs], max_norm)
    assert clip_grad_norm(grad, max_norm) == pytest.approx(float(norm), rel=1e-6)
    torch.testing.assert_close(grad, theirs.grad, rtol=1e-6, atol=0)


def test_clipping_leaves_alone_what_it_must() -> None:
    grad = torch.full((4,), 3.0)
    assert clip_grad_norm(grad, 0.0) == pytest.approx(6.0)
    assert grad.tolist() == [3.0] * 4
    assert math.isnan(clip_grad_norm(torch.tensor([1.0, math.nan]), 1.0))
    infinite = torch.tensor([1.0, math.inf])
    assert math.isinf(clip_grad_norm(infinite, 1.0))
    assert infinite.tolist() == [1.0, math.inf]


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(("total", "ratio"), [(40, 0.1), (7, 0.0), (3, 0.5), (1, 0.05)])
def test_schedule_equals_transformers_one_step_later(ours: Scheduler, theirs: str, total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = transformers.get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup_steps(total, ratio), num_training_steps=total + 1
    )
    expected = []
    for _ in range(total):
        optimizer.step()
        reference.step()
        expected.append(reference.get_last_lr()[0])
    found = [
        learning_rate(step, peak=3e-4, total_steps=total, warmup_ratio=ratio, scheduler=ours) for step in range(total)
    ]
    assert found == pytest.approx(expected, rel=1e-9)
    assert min(found) > 0


@pytest.mark.parametrize(
    ("rows", "tokens", "epochs", "batch_size"),
    [(5, 400, 3, 4), (90, 6_000, 3, 8), (400, 52_000, 2, 8), (5_000, 600_000, 1, 16), (500_000, 10**8, 1, 64)],
)
def test_auto_values_suit_the_size(rows: int, tokens: int, epochs: int, batch_size: int) -> None:
    for requested in ({}, {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}):
        found = resolve_hyperparameters(rows, tokens, requested)
        assert (found.n_epochs, found.batch_size, found.learning_rate) == (epochs, batch_size, 5e-4)


def test_values_that_were_asked_for_are_kept() -> None:
    found = resolve_hyperparameters(100, 9_000, {"n_epochs": 7, "batch_size": 32.0, "learning_rate_multiplier": 0.5})
    assert (found.n_epochs, found.batch_size, found.learning_rate) == (7, 32, 2.5e-4)
    assert resolve_hyperparameters(100, 9_000, {"learning_rate": 1e-3}).learning_rate_multiplier == pytest.approx(2.0)
    assert resolve_hyperparameters(3, 90, {"batch_size": 32}).batch_size == 3  # no more than there are


@pytest.mark.parametrize(
    ("requested", "param"),
    [
        ({"n_epochs": 0}, "n_epochs"),
        ({"n_epochs": 51}, "n_epochs"),
        ({"n_epochs": 1.5}, "n_epochs"),
        ({"n_epochs": True}, "n_epochs"),
        ({"batch_size": "many"}, "batch_size"),
        ({"batch_size": 257}, "batch_size"),
        ({"learning_rate_multiplier": 0}, "learning_rate_multiplier"),
        ({"learning_rate_multiplier": math.nan}, "learning_rate_multiplier"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": 1e-4, "learning_rate_multiplier": 2}, "learning_rate_multiplier"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(requested: Mapping[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve_hyperparameters(100, 9_000, requested)
    assert caught.value.param == param


def test_held_out_share() -> None:
    assert [round(rows * held_out_fraction(rows)) for rows in (20, 50, 400, 1_000, 50_000)] == [4, 5, 40, 100, 100]


def test_the_norm_of_a_whole_base_s_gradient_is_that_of_float64() -> None:
    """A float32 sum of so many squares stands still long before its end."""
    grad = torch.full((2**26,), 1e-3)
    assert clip_grad_norm(grad, 0.0) == pytest.approx(1e-3 * 2**13, rel=1e-6)
    assert clip_grad_norm(grad, 1.0) == pytest.approx(1e-3 * 2**13, rel=1e-6)
    assert float(grad[:: 2**20].double().norm()) * 2**10 == pytest.approx(1.0, rel=1e-5)
