"""Sweeps: which settings are tried, and what becomes of them in the job."""

from __future__ import annotations

import csv
import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tenora.control.control import Control
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.shape import Limits
from tenora.control.jobs.sweeps import TRIAL_COLUMNS, points
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError
from tests.control.conftest import (
    BASE,
    MANY_ROWS,
    OpenControl,
    content_of,
    create_job,
    messages,
    tenant,
    until,
    until_told,
    upload,
)
from tests.support.scripted_jobs import JobScript

LIMITS = Limits(BASE, 64, 256, frozenset({"q_proj"}))


def test_lists_make_a_grid() -> None:
    given = {"rank": [8, 16], "learning_rate": [2e-4, 5e-4, 1e-3], "batch_size": [4]}
    found = points(given, LIMITS, 0)
    wanted = itertools.product([8, 16], [2e-4, 5e-4, 1e-3])
    assert found == [{"rank": rank, "learning_rate": rate, "batch_size": 4} for rank, rate in wanted]
    some = points({**given, "trials": 4}, LIMITS, 0)
    assert len(some) == 4
    assert all(point in found for point in some)
    assert some == points({**given, "trials": 4}, LIMITS, 0)
    assert {str(points({**given, "trials": 4}, LIMITS, seed)) for seed in range(5)} != {str(some)}
    assert points({**given, "trials": 60}, LIMITS, 0) == found


def test_of_a_grid_of_millions_only_the_trials_are_made() -> None:
    given = {
        "rank": list(range(1, 65)),
        "learning_rate": [1e-4 * step for step in range(1, 65)],
        "batch_size": list(range(1, 33)),
        "trials": 5,
    }
    small = {name: values[:6] for name, values in given.items() if isinstance(values, list)}
    random = np.random.default_rng(3)
    grid = [dict(zip(small, point, strict=True)) for point in itertools.product(*small.values())]
    assert points({**small, "trials": 5}, LIMITS, 3) == [
        grid[index] for index in sorted(random.choice(len(grid), 5, replace=False).tolist())
    ]
    tracemalloc.start()
    try:
        assert len(points(given, LIMITS, 3)) == 5
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_ranges_are_covered_evenly() -> None:
    """What makes it a Latin hypercube: each of N equal shares of every dimension has one of N trials."""
    given = {
        "learning_rate": {"min": 1e-4, "max": 1e-2},  # logarithmic by itself
        "batch_size": {"min": 1, "max": 32},
        "rank": [4, 8, 16, 32],
        "trials": 16,
    }
    found = points(given, LIMITS, 7)
    assert len(found) == 16
    shares = sorted(int(16 * np.log(point["learning_rate"] / 1e-4) / np.log(100)) for point in found)
    assert shares == list(range(16))
    assert sorted((int(point["batch_size"]) - 1) // 2 for point in found) == list(range(16))
    assert sorted(point["rank"] for point in found) == sorted([4, 8, 16, 32] * 4)
    assert all(1e-4 <= point["learning_rate"] <= 1e-2 for point in found)
    assert points(given, LIMITS, 7) == found != points(given, LIMITS, 8)
    linear = points({**given, "learning_rate": {"min": 1e-4, "max": 1e-2, "log": False}}, LIMITS, 7)
    assert sorted(int(16 * (point["learning_rate"] - 1e-4) / 99e-4) for point in linear) == list(range(16))
    assert len(points({"rank": {"min": 1, "max": 64}}, LIMITS, 0)) == 12
    few = points({"n_epochs": {"min": 1, "max": 3}, "trials": 8}, LIMITS, 0)
    assert sorted(point["n_epochs"] for point in few) == [1, 2, 3]  # each once


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sweep": {}}, "sweep"),
        ({"sweep": {"rank": [8]}}, "sweep"),
        ({"sweep": {"rank": []}}, "sweep.rank"),
        ({"sweep": {"rank": 8}}, "sweep.rank"),
        ({"sweep": {"rank": [8, 8]}}, "sweep.rank"),
        ({"sweep": {"rank": [8, 300]}}, "sweep.rank"),
        ({"sweep": {"rank": [8, True]}}, "sweep.rank"),
        ({"sweep": {"n_epochs": [1, 51]}}, "sweep.n_epochs"),
        ({"sweep": {"batch_size": [0, 1]}}, "sweep.batch_size"),
        ({"sweep": {"learning_rate": [1e-3, float("nan")]}}, "sweep.learning_rate"),
        ({"sweep": {"learning_rate": {"min": 1e-3}}}, "sweep.learning_rate.max"),
        ({"sweep": {"learning_rate": {"min": 1e-3, "max": 1e-4}}}, "sweep.learning_rate.min"),
        ({"sweep": {"learning_rate": {"min": 1e-4, "max": 1e-3, "step": 1}}}, "sweep.learning_rate.step"),
        ({"sweep": {"learning_rate": {"min": 1e-4, "max": 1e-3}, "sampler": "grid"}}, "sweep.sampler"),
        ({"sweep": {"rank": [8, 16], "sampler": "tpe"}}, "sweep.sampler"),
        ({"sweep": {"rank": [8, 16], "sampler": "sobol"}}, "sweep.sampler"),
        ({"sweep": {"rank": [8, 16], "trials": 65}}, "sweep.trials"),
        ({"sweep": {"rank": [1, 2, 3, 4, 5, 6, 7, 8, 9], "n_epochs": [1, 2, 3, 4, 5, 6, 7, 8]}}, "sweep.trials"),
        ({"sweep": {"alpha": [8, 16]}}, "sweep.alpha"),
        ({"sweep": {"rank": [8, 16]}, "lora": {"rank": 8}}, "sweep.rank"),
        ({"sweep": {"n_epochs": [1, 2]}, "n_epochs": 1}, "sweep.n_epochs"),
        ({"sweep": {"n_epochs": [1, 2]}, "max_steps": 10}, "sweep.n_epochs"),
        ({"sweep": {"batch_size": [1, 2]}, "hyperparameters": {"batch_size": 1}}, "sweep.batch_size"),
        ({"sweep": {"learning_rate": [1e-4, 1e-3]}, "learning_rate": 1e-3}, "sweep.learning_rate"),
        (
            {"sweep": {"learning_rate": [1e-4, 1e-3]}, "hyperparameters": {"learning_rate_multiplier": 2}},
            "sweep.learning_rate",
        ),
    ],
)
async def test_bad_sweeps_name_the_field(control: Control, acme: Principal, fields: dict[str, Any], param: str) -> None:
    file = await upload(control, acme)
    with pytest.raises(InvalidRequestError) as caught:
        await control.jobs.create(acme, JobRequest(model=BASE, training_file=file.id, **fields))
    assert caught.value.param == param


async def test_a_sweep_ends_in_a_table_and_the_winners_settings(
    control: Control, acme: Principal, script: JobScript
) -> None:
    sweep = {"rank": [4, 8], "learning_rate": [1e-3, 2e-3], "batch_size": [2], "sampler": "grid"}
    script.winner = 2
    file = await upload(control, acme, MANY_ROWS)
    made = await create_job(control, acme, training_file=file.id, name="best", sweep=sweep)
    assert (made.sweep, made.sweep_results) == (sweep, None)
    job = await until(control, acme, made.id)
    assert job.status == "succeeded", job.error
    (spec,) = script.specs
    assert [(trial["rank"], trial["alpha"], trial["learning_rate"], trial["batch_size"]) for trial in spec.trials] == [
        (4, 8.0, 1e-3, 2),
        (4, 8.0, 2e-3, 2),
        (8, 16.0, 1e-3, 2),
        (8, 16.0, 2e-3, 2),
    ]
    assert {trial["n_epochs"] for trial in spec.trials} == {3}
    assert spec.folds == 0
    assert job.sweep_results is not None
    assert [(one["status"], one["winner"], one["valid_loss"]) for one in job.sweep_results] == [
        ("failed", False, None),
        ("stopped", False, 3.0),
        ("finished", True, 1.5),
        ("stopped", False, 5.0),
    ]
    assert job.sweep_results[0]["reason"] == "The loss is not finite."
    assert job.hyperparameters == {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 2.0}
    assert (job.lora["rank"], job.lora["alpha"], job.settings["learning_rate"]) == (8, 16.0, 1e-3)
    assert (await control.adapters.get(acme, "best")).rank == 8

    said = await messages(control, acme, job.id)
    assert "The sweep tries 4 settings at once and stops the worse ones early" in said
    assert "Trial 3 of 4, step 4/4: best validation loss=1.500; finished" in said
    assert "Trial 1 of 4, step 2/4: best validation loss=nan; failed: The loss is not finite." in said
    events = [event for event in (await control.jobs.events(acme, job.id, limit=100)).items if event.type == "metrics"]
    assert {(event.data["trial"], event.data["status"]) for event in events} >= {(2, "finished"), (1, "stopped")}
    assert events[0].data["trained_tokens"] == 70  # the newest one

    files = [await control.files.get(acme, one) for one in job.result_files]
    assert [file.filename for file in files] == ["step_metrics.csv", "sweep.csv"]
    metrics, table = [
        list(csv.DictReader((await content_of(control, acme, one)).decode().splitlines())) for one in job.result_files
    ]
    assert [(row["step"], row["valid_loss"]) for row in metrics] == [("2", "1.5"), ("4", "1.5")]  # the winner's
    assert tuple(table[0]) == TRIAL_COLUMNS
    assert [(row["trial"], row["rank"], row["status"], row["winner"]) for row in table] == [
        ("0", "4", "failed", "False"),
        ("1", "4", "stopped", "False"),
        ("2", "8", "finished", "True"),
        ("3", "8", "stopped", "False"),
    ]


async def test_what_a_sweep_chooses_is_open_until_it_has(control: Control, acme: Principal, script: JobScript) -> None:
    script.hold_at = 4
    sweep = {"rank": [4, 8], "n_epochs": {"min": 1, "max": 9}, "learning_rate": [1e-3, 2e-3], "trials": 3}
    made = await create_job(control, acme, sweep=sweep, lora={"dropout": 0.1, "alpha": 12})
    await script.until_held()
    job = await until_told(control, acme, made.id, lambda job: job.trained_tokens == 30)
    assert job.hyperparameters["n_epochs"] == job.hyperparameters["learning_rate_multiplier"] == "auto"
    assert isinstance(job.hyperparameters["batch_size"], int)
    assert "rank" not in job.lora
    assert (job.lora["dropout"], job.lora["alpha"]) == (0.1, 12)  # what was asked for stays
    assert {trial["alpha"] for trial in script.specs[0].trials} == {12}
    assert "learning_rate" not in job.settings
    assert job.sweep_results is not None
    assert [one["status"] for one in job.sweep_results] == ["failed", "running", "running"]
    assert job.trained_tokens == 30  # of all trials, as the latest event says
    assert script.specs[0].tasks[0].valid_path  # trials are compared on held-out rows, however few there are
    script.go_on()
    assert (await until(control, acme, made.id)).status == "succeeded"


async def test_a_restart_keeps_the_table(open_control: OpenControl, script: JobScript) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    script.hold_at = 4
    job = await create_job(control, acme, sweep={"rank": [4, 8, 16]}, seed=5)
    await script.until_held()
    await control.close()
    script.hold_at = None
    control = await open_control()
    before = await control.jobs.get(acme, job.id)
    assert [one["step"] for one in before.sweep_results or ()][1] >= 2
    done = await until(control, acme, job.id)
    assert script.specs[0] == script.specs[1]
    assert done.sweep_results is not None
    assert [one["winner"] for one in done.sweep_results] == [False, True, False]
    assert done.lora["rank"] == 8
