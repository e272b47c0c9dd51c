"""Every kind of job over the real engine and a tiny base, from the request to an adapter that answers."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tenora.control.adapters.model_card import model_card
from tenora.control.control import Control
from tenora.control.jobs.forgetting_text import general_text
from tenora.control.jobs.records import JobRecord, JobRequest
from tenora.control.tenancy.records import Principal
from tenora.training.fusion import FusedTraining
from tenora.training.methods.table import METHODS
from tenora.training.pass_queue import Work
from tests.control.conftest import BASE, MANY_ROWS, ROWS, content_of, messages, tenant, until, upload
from tests.control.jobs.test_job_methods import PAIRS
from tests.control.test_real_engine import Service, _one_thread, say, scores, service

__all__ = ["_one_thread", "service"]  # fixtures


async def finish(
    control: Control, who: Principal, rows: list[dict[str, Any]] | None = None, **fields: Any
) -> JobRecord:
    if rows is not None:
        fields["training_file"] = (await upload(control, who, rows)).id
    made = await control.jobs.create(who, JobRequest(**{"model": BASE, "seed": 3, **fields}))
    job = await until(control, who, made.id)
    assert job.status == "succeeded", (job.error, await messages(control, who, made.id))
    base, ours = [scores(await say(control, who, name)) for name in (BASE, str(job.fine_tuned_model))]
    assert ours != base
    return job


async def test_few_rows(service: Service) -> None:
    acme = await tenant(service.control, "acme")
    job = await finish(service.control, acme, ROWS[:12], n_epochs=4)
    assert job.evaluation is not None
    assert job.evaluation["valid_loss"] < job.evaluation["base_loss"]
    assert job.evaluation["forgetting"]["change"] != 0.0
    assert (await service.control.adapters.get(acme, job.name)).rank == 8
    said = await messages(service.control, acme, job.id)
    assert all(any(line.startswith(f"Fold {n}/5: validation loss=") for line in said) for n in range(1, 6))
    metrics = [event.data for event in (await service.control.jobs.events(acme, job.id, limit=100)).items]
    tokens = [one["trained_tokens"] for one in reversed(metrics) if "trained_tokens" in one]
    assert tokens == sorted(tokens)
    assert job.trained_tokens == tokens[-1] == job.evaluation["trained_tokens"]


async def test_several_tasks(service: Service) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    ids = [(await upload(control, acme, rows)).id for rows in (ROWS, ROWS[:8])]
    listed = [{"file": ids[0], "name": "a"}, {"file": ids[1], "name": "b", "weight": 2}]
    job = await finish(control, acme, training_files=listed, n_epochs=2, lora={"rank": 4})
    metrics = [event.data for event in (await control.jobs.events(acme, job.id, limit=100)).items if event.data]
    assert {"valid_loss/a", "valid_loss/b"} <= set().union(*metrics)
    assert job.evaluation is not None
    tasks = {task["name"]: task for task in job.evaluation["tasks"]}
    assert {name: (task["weight"], task["trained"], task["held_out"]) for name, task in tasks.items()} == {
        "a": (1.0, 16, 4),
        "b": (2.0, 6, 2),
    }
    best = next(line for line in metrics if line.get("step") == job.evaluation["best_step"] and "valid_loss/a" in line)
    for name, task in tasks.items():
        assert task["comparison"]["adapter_loss"] == pytest.approx(best[f"valid_loss/{name}"])
        assert task["comparison"]["rows"] == task["held_out"]
    pooled = sum(task["comparison"]["adapter_loss"] * task["comparison"]["tokens"] for task in tasks.values())
    assert pooled / job.evaluation["held_out"]["tokens"] == pytest.approx(job.evaluation["valid_loss"])
    curve = [(line["step"], line["valid_loss"]) for line in reversed(metrics) if "valid_loss" in line]
    assert [(point["step"], point["valid_loss"]) for point in job.evaluation["curve"]] == curve
    card = model_card(await control.adapters.get(acme, job.name))
    for name, task in tasks.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {task['comparison']['adapter_loss']:.4f} | {task['comparison']['other_loss']:.4f} |" in row


async def test_a_sweep(service: Service) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    sweep = {"rank": [2, 4], "learning_rate": [1e-5, 2e-3]}
    job = await finish(control, acme, ROWS, sweep=sweep, n_epochs=3, name="best")
    assert job.sweep_results is not None
    (winner,) = [trial for trial in job.sweep_results if trial["winner"]]
    assert winner["learning_rate"] == 2e-3
    assert winner["status"] == "finished"
    assert {trial["status"] for trial in job.sweep_results} == {"stopped", "finished"}
    assert winner["valid_loss"] == min(trial["valid_loss"] for trial in job.sweep_results)
    assert (await control.adapters.get(acme, "best")).rank == winner["rank"] == job.lora["rank"]
    assert len(job.result_files) == 2
    assert job.evaluation is not None
    assert job.evaluation["trials"] == 4
    card = model_card(await control.adapters.get(acme, "best"))
    assert "These rows also chose this adapter among 4 trials" in card
    assert any("chose this adapter among 4 trials" in note for note in job.evaluation["notes"])


async def test_preferences_and_transfer(service: Service) -> None:
    """A supervised adapter, then its answers preferred from there on with a higher rank and more modules."""
    control = service.control
    acme = await tenant(control, "acme")
    shape = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    first = await finish(control, acme, ROWS, n_epochs=3, lora=shape, name="first")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 10}}}
    wider = {"rank": 4, "target_modules": "all-linear"}
    second = await finish(control, acme, PAIRS, method=method, model="first", lora=wider, name="second")
    assert second.parent == "first"
    version = await control.adapters.get(acme, "second")
    assert (version.rank, version.parent) == (4, "first")
    metrics = [event.data for event in (await control.jobs.events(acme, second.id, limit=100)).items if event.data]
    (start,) = [line for line in metrics if line["step"] == 0]
    assert start["valid_loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is its own reference
    assert metrics[0]["valid_loss"] < start["valid_loss"]
    assert metrics[0]["rewards/margins"] > 0
    table = (await content_of(control, acme, second.result_files[0])).decode()
    rows = {int(row["step"]): row for row in csv.DictReader(table.splitlines())}
    assert list(rows[0])[5:] == [f"{side}_{name}" for name in METHODS["dpo"].metrics for side in ("train", "valid")]
    for line in metrics:
        for side, its_own in (("train", "train_loss"), ("valid", "full_valid_loss")):
            if its_own in line:
                found = {name: rows[line["step"]][f"{side}_{name}"] for name in METHODS["dpo"].metrics}
                assert found == {name: str(line[name]) for name in METHODS["dpo"].metrics}

    again = await finish(control, acme, ROWS, max_steps=1, learning_rate=1e-9, model=str(first.fine_tuned_model))
    files = [
        control.jobs._blobs.store.path((await control.adapters.get(acme, name)).digest)
        for name in ("first", again.name)
    ]
    before, after = [load_file(path / "adapter_model.safetensors") for path in files]
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert json.loads((files[1] / "adapter_config.json").read_text())["lora_alpha"] == 4


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (ROWS[:12], {"n_epochs": 1}),
        (ROWS[:12], {"max_steps": 6, "eval_interval": 2, "early_stopping": False}),
        (MANY_ROWS, {"n_epochs": 1, "eval_interval": 4}),
        (PAIRS, {"n_epochs": 1, "method": {"type": "dpo"}}),
    ],
    ids=["few-shot", "few-shot by steps", "single", "dpo"],
)
async def test_the_estimate_is_of_what_is_run(
    service: Service, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], fields: dict[str, Any]
) -> None:
    """Counted in the engine: optimizer steps, and the tokens of every pass that learns and that only measures."""
    steps, learned, measured = 0, 0, 0
    run = FusedTraining._run

    def look(self: FusedTraining, works: list[Work]) -> Any:
        nonlocal steps, learned, measured
        for work in works:
            tokens = work.parts[len(work.results)].row_tokens
            if work.objective is None:
                measured += tokens
            else:
                learned += tokens
                steps += not work.results
        return run(self, works)

    monkeypatch.setattr(FusedTraining, "_run", look)
    control = service.control
    acme = await tenant(control, "acme")
    file = (await upload(control, acme, rows)).id
    request = JobRequest(model=BASE, seed=3, training_file=file, **fields)
    found = await control.estimates.estimate(acme, request)
    job = await finish(control, acme, training_file=file, **fields)
    assert job.evaluation is not None
    assert len(job.evaluation["curve"]) == found.evaluations
    unused = 0 if not found.folds else found.steps - steps  # of the fit on all rows, if it ended before its last step
    assert 0 <= unused < 6
    assert found.steps == steps + unused
    if not unused:
        assert found.read_tokens == pytest.approx(learned, rel=0.02 if "max_steps" in fields else 0)
    # The general text is measured under the result only where that is the best so far.
    text = len(general_text(control.files._tokenizing.tokenizer, 256)) - 1
    spared = found.measured_tokens - measured
    assert 0 <= spared <= found.evaluations * text
    assert spared % text == 0
