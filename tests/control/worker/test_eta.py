"""When a run will end, told from its events against a clock that the test moves."""

from __future__ import annotations

import pytest

from tenora.control.worker.eta import Eta
from tenora.training.events import EvalEvent, FoldEvent, StepEvent, TrialEvent, TrialStatus
from tenora.training.recipes import halving_rungs
from tenora.training.spec import TaskSpec, TrainSpec, Trial


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def spec(trials: int = 0, *, n_epochs: int = 2, eval_interval: int = 0, folds: int = 0) -> TrainSpec:
    point: Trial = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-3, "n_epochs": 2, "batch_size": 4}
    return TrainSpec(
        run_id="run",
        share_group="group",
        tasks=(TaskSpec(name="rows", train_path="train"),),
        workdir="",
        base_model="base",
        n_epochs=n_epochs,
        eval_interval=eval_interval,
        folds=folds,
        trials=(point,) * trials,
    )


def step(number: int, total: int = 20) -> StepEvent:
    return StepEvent(
        run_id="run",
        step=number,
        total_steps=total,
        epoch=0.0,
        train_loss=1.0,
        train_accuracy=0.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        trained_tokens=1,
        tokens_per_second=1.0,
    )


def evaluation(number: int, *, best: bool = True) -> EvalEvent:
    return EvalEvent(run_id="run", step=number, valid_loss=1.0, valid_accuracy=0.5, base_loss=2.0, best=best)


def fold(number: int, done: float, *, before: float = 0.0) -> FoldEvent:
    return FoldEvent(
        run_id="run",
        fold=number,
        step=1,
        total_steps=20,
        valid_loss=1.0,
        base_loss=2.0,
        trained_tokens=1,
        done=done,
        done_before=before,
    )


def test_evaluations_that_are_still_to_come_count() -> None:
    clock = Clock()
    eta = Eta(spec(), clock=clock)
    assert eta.left(evaluation(0)) is None
    assert eta.left(step(1)) is None
    for number in range(2, 11):
        clock.now += 2.0
        left = eta.left(step(number))
        assert left == pytest.approx(2.0 * (20 - number))  # how long an evaluation takes is not known yet
    clock.now += 30.0
    assert eta.left(evaluation(10)) == pytest.approx(20.0 + 30.0)  # ten steps and the evaluation after them
    clock.now += 2.0
    assert eta.left(step(11)) == pytest.approx(18.0 + 30.0)
    for number in range(12, 21):
        clock.now += 2.0
        left = eta.left(step(number))
    assert left == pytest.approx(0.0)


def test_the_interval_of_evaluations_counts() -> None:
    clock = Clock()
    eta = Eta(spec(eval_interval=4), clock=clock)
    eta.left(step(1))
    clock.now += 1.0
    eta.left(step(2))
    clock.now += 10.0
    assert eta.left(evaluation(4)) == pytest.approx(16.0 + 4 * 10.0)  # after 8, 12, 16 and 20


def test_the_fit_after_a_cross_validation_measures_nothing() -> None:
    clock = Clock()
    eta = Eta(spec(folds=5), clock=clock)
    for number in (0, 10, 20):
        clock.now += 50.0
        assert eta.left(evaluation(number)) is None
    eta.left(step(1))
    clock.now += 1.0
    assert eta.left(step(2)) == pytest.approx(18.0)


def test_a_cross_validation_ends_when_the_fit_on_all_rows_does() -> None:
    """Simulated: a row takes a second. The folds see 4 times 100 of them, and the fit 100 or fewer."""
    clock = Clock()
    eta = Eta(spec(folds=5), clock=clock)
    for epoch in range(10):
        for number in range(5):
            clock.now += 8.0
            left = eta.left(fold(number, (5 * epoch + number + 1) / 50))
            assert left == pytest.approx(100.0 + 400.0 + 100.0 - clock.now)
    for number in range(11):
        left = eta.left(evaluation(2 * number, best=0 < number <= 4))
    assert left == pytest.approx(40.0)
    clock.now += 5.0
    assert eta.left(step(1)) is None
    clock.now += 5.0
    assert eta.left(step(2)) == pytest.approx(30.0)  # the fit ends at step 8 of 20


def test_a_resumed_cross_validation_counts_what_it_does_from_now_on() -> None:
    clock = Clock()
    eta = Eta(spec(folds=5), clock=clock)
    assert eta.left(fold(0, 0.5, before=0.5)) is None
    clock.now += 40.0
    assert eta.left(fold(0, 0.6, before=0.5)) == pytest.approx(400.0 * 0.4 + 100.0)
    resumed_later = Eta(spec(folds=5), clock=clock)  # when all folds are over, so that none says anything
    assert [resumed_later.left(evaluation(number)) for number in (0, 10, 20)] == [None] * 3


def test_the_pace_follows_the_load() -> None:
    clock = Clock()
    eta = Eta(spec(), clock=clock)
    seen = []
    for number in range(1, 61):
        clock.now += 1.0 if number <= 10 else 5.0  # another job begins
        seen.append(eta.left(step(number, 100)))
    assert seen[8] is not None
    assert seen[8] / 91 == pytest.approx(1.0)
    assert seen[-1] is not None
    assert seen[-1] / 40 == pytest.approx(5.0, rel=0.05)


def trial(number: int, done: int, status: TrialStatus = "running", total: int = 60) -> TrialEvent:
    return TrialEvent(
        run_id="run", trial=number, status=status, step=done, total_steps=total, trained_tokens=1, valid_loss=1.0
    )


def test_a_sweep_ends_when_its_halving_does() -> None:
    """Simulated: every step of any trial takes a second, and the estimate is right from the first rung on."""
    clock, trials = Clock(), 9
    eta = Eta(spec(trials), clock=clock)
    alive = list(range(trials))
    before, estimates = 0, []
    for share, survivors in halving_rungs(trials):
        until = round(60 * share)
        for done in range(before + 5, until + 1, 5):
            for number in alive:
                clock.now += 5.0
                estimates.append((clock.now, eta.left(trial(number, done))))
        estimates += [(clock.now, eta.left(trial(number, until, "stopped"))) for number in alive[survivors:]]
        alive, before = alive[:survivors], until
    end = clock.now
    told = [(now, now + left) for now, left in estimates if left is not None]
    assert len(told) > 30
    assert all(abs(finish - end) < 0.35 * (end - 100.0) for _, finish in told)
    assert all(abs(finish - end) < 20.0 for now, finish in told if now > 280.0)
    clock.now += 1.0
    assert eta.left(trial(0, 60, "finished")) == pytest.approx(0.0)


def test_a_resumed_sweep_counts_what_it_does_from_now_on() -> None:
    clock = Clock()
    eta = Eta(spec(3), {0: 1 / 6, 1: 1 / 6, 2: 1 / 6}, clock=clock)
    for number in range(3):
        clock.now += 10.0
        left = eta.left(trial(number, 20))  # of 60: each did 10 steps in 10 seconds
    assert left == pytest.approx(40.0)  # one of them goes on to the end
