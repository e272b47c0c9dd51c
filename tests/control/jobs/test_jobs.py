"""A job from request to adapter: its log, its results, its checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenora.control.control import Control
from tenora.control.tenancy.records import Principal
from tenora.control.worker.log import CSV_COLUMNS
from tenora.data.dataset import TokenizedDataset
from tenora.errors import (
    ConflictError,
    ModelNotFoundError,
)
from tenora.training.events import CheckpointEvent
from tests.control.conftest import (
    BASE,
    MANY_ROWS,
    ROWS,
    ImportAdapter,
    content_of,
    create_job,
    messages,
    until,
    until_true,
    upload,
    workdir,
)
from tests.support.scripted_jobs import JobScript


async def test_a_job_becomes_a_callable_adapter(
    control: Control, acme: Principal, script: JobScript, home: Path
) -> None:
    job = await create_job(
        control,
        acme,
        training_file=(await upload(control, acme, MANY_ROWS)).id,
        suffix="Desk",
        seed=7,
        metadata={"team": "a"},
        lora={"rank": 8},
        hyperparameters={"n_epochs": 2, "batch_size": "auto"},
        scheduler="linear",
        learning_rate=1e-3,
    )
    assert (job.status, job.name, job.seed, job.tenant) == ("validating_files", "desk", 7, "acme")
    assert job.hyperparameters == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert (job.fine_tuned_model, job.finished_at, job.error, job.result_files) == (None, None, None, ())
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model == f"ft:{BASE}:acme:Desk:{job.id.partition('-')[2]}"
    assert done.finished_at is not None
    assert (done.estimated_finish, done.error) == (None, None)
    assert (done.trained_tokens, done.metadata) == (40, {"team": "a"})
    assert done.hyperparameters["n_epochs"] == 2
    assert isinstance(done.hyperparameters["batch_size"], int)
    assert done.evaluation is not None
    assert (done.evaluation["valid_loss"], done.evaluation["base_loss"], done.evaluation["best_step"]) == (1.5, 3.0, 4)
    (spec,) = script.specs
    assert (spec.lora.rank, spec.lora.alpha, spec.scheduler, spec.n_epochs, spec.learning_rate) == (
        8,
        16,
        "linear",
        2,
        1e-3,
    )
    assert (spec.share_group, spec.run_id, spec.seed, spec.base_model) == (acme.tenant_id, job.id, 7, BASE)

    said = await messages(control, acme, job.id)
    assert said[0] == f"Created fine-tuning job: {job.id}"
    assert said[1] == f"Validating training file: {job.training_file}"
    assert "54 rows to train on, 6 held out" in said[2]
    assert said[3] == "Fine-tuning job started"
    assert "Step 1/4: training loss=2.75" in said
    assert "Step 4/4: validation loss=1.50 (base 3.00)" in said
    assert said[-2:] == [f"New fine-tuned model created: {done.fine_tuned_model}", "The job has successfully completed"]
    events = (await control.jobs.events(acme, job.id, limit=1000)).items
    steps = [event.data for event in reversed(events) if event.type == "metrics" and "train_loss" in event.data]
    assert [(data["step"], data["total_steps"], data["train_loss"]) for data in steps][-1] == (4, 4, 2.0)
    assert steps[0]["grad_norm"] is None  # NaN has no place in JSON
    json.dumps([event.data for event in events], allow_nan=False)

    for name in ("desk", "acme/desk", done.fine_tuned_model):
        target = await control.inference.resolve(acme, name, None)
        assert target.adapter is not None
    adapter = await control.adapters.get(acme, "desk")
    assert (adapter.source, adapter.job_id, adapter.rank) == ("job", job.id, 8)
    assert (adapter.fine_tuned_model, adapter.evaluation) == (done.fine_tuned_model, done.evaluation)
    assert [card.id for card in await control.models.list(acme)] == [BASE, "desk", done.fine_tuned_model]

    (result_id,) = done.result_files
    record = await control.files.get(acme, result_id)
    assert (record.purpose, record.filename, record.status) == ("fine-tune-results", "step_metrics.csv", "processed")
    content = (await content_of(control, acme, result_id)).decode()
    assert len(content) == record.bytes
    rows = list(csv.DictReader(content.splitlines()))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert (rows[-1]["train_loss"], rows[-1]["valid_loss"], rows[1]["valid_loss"]) == ("2.0", "1.5", "")

    (checkpoint,) = (await control.jobs.checkpoints(acme, job.id)).items
    assert (checkpoint.step_number, checkpoint.metrics["valid_loss"]) == (4, 1.5)
    assert checkpoint.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-4"
    assert (await control.inference.resolve(acme, checkpoint.fine_tuned_model_checkpoint, None)).adapter is not None
    await until_true(lambda: not workdir(home, acme, job.id).exists())


async def test_the_rows_are_split_by_seed_or_by_file(control: Control, acme: Principal, script: JobScript) -> None:
    seen: list[tuple[int, int]] = []
    write = script.write

    def load(path: str) -> int:
        return len(TokenizedDataset.load(Path(path)))

    def look(path: Path, spec: Any) -> None:
        (task,) = spec.tasks
        seen.append((load(task.train_path), load(task.valid_path) if task.valid_path else 0))
        write(path, spec)

    script.write = look  # type: ignore[method-assign]  # looks at what the run is given
    for rows in (ROWS, MANY_ROWS):
        file = await upload(control, acme, rows)
        await until(control, acme, (await create_job(control, acme, training_file=file.id)).id)
    valid = await upload(control, acme, ROWS[:5])
    job = await create_job(control, acme, validation_file=valid.id)
    await until(control, acme, job.id)
    assert seen == [(20, 0), (54, 6), (20, 5)]
    assert f"Validating validation file: {valid.id}" in await messages(control, acme, job.id)


async def test_names(control: Control, acme: Principal, import_adapter: ImportAdapter) -> None:
    await import_adapter(control, acme, "desk")
    named = await create_job(control, acme, name="desk", suffix="other")
    assert named.name == "desk"
    unnamed = await create_job(control, acme)
    assert unnamed.name == unnamed.id
    await until(control, acme, named.id)
    done = await until(control, acme, unnamed.id)
    assert done.fine_tuned_model == f"ft:{BASE}:acme::{unnamed.id.partition('-')[2]}"
    assert [one.version for one in await control.adapters.versions(acme, "desk")] == [2, 1]
    assert (await control.adapters.get(acme, "desk")).job_id == named.id


async def test_a_job_with_rows_that_do_not_fit_fails_with_their_lines(
    control: Control, acme: Principal, script: JobScript
) -> None:
    long = {"messages": [{"role": "user", "content": "long " * 400}, {"role": "assistant", "content": "x"}]}
    file = await upload(control, acme, [*ROWS[:3], long])
    job = await until(control, acme, (await create_job(control, acme, training_file=file.id)).id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert "line 4" in job.error["message"]
    assert script.specs == []
    assert (await messages(control, acme, job.id))[-1].startswith("The job failed: ")
    cut = await create_job(control, acme, training_file=file.id, truncate=True, max_seq_length=64)
    failed = await until(control, acme, cut.id)
    assert failed.error is not None  # its answer would be cut off whole
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 400}]}
    file = await upload(control, acme, [*ROWS[:3], short])
    cut = await create_job(control, acme, training_file=file.id, truncate=True, max_seq_length=64)
    assert (await until(control, acme, cut.id)).status == "succeeded"
    assert "1 rows were cut to fit the sequence length" in await messages(control, acme, cut.id)


async def test_a_failed_run_fails_the_job_alone(
    control: Control, acme: Principal, script: JobScript, home: Path
) -> None:
    message = "The loss became NaN at step 4; lower the learning rate."
    script.fail_with = ("nan_loss", message)
    job = await until(control, acme, (await create_job(control, acme, name="desk")).id)
    assert (job.status, job.fine_tuned_model) == ("failed", None)
    assert job.error == {"code": "nan_loss", "message": message, "param": None}
    await until_true(lambda: not workdir(home, acme, job.id).exists())
    with pytest.raises(ModelNotFoundError):
        await control.inference.resolve(acme, "desk", None)
    script.fail_with = None
    assert (await until(control, acme, (await create_job(control, acme, name="desk")).id)).status == "succeeded"


async def test_an_adapter_that_cannot_be_served_is_not_published(
    control: Control, acme: Principal, script: JobScript
) -> None:
    script.broken = True
    job = await until(control, acme, (await create_job(control, acme, name="desk")).id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "invalid_adapter"
    assert await control.adapters.list(acme) == []


async def test_only_the_last_checkpoints_are_kept(
    control: Control, acme: Principal, script: JobScript, home: Path
) -> None:
    events = script.training

    def many(spec: Any) -> Any:
        *before, last = events(spec)
        made = []
        for step in range(1, 6):
            path = Path(spec.workdir) / "checkpoints" / f"more-{step}"
            if not path.exists():
                script.write(path, _replace_seed(spec, step))
            made.append(
                CheckpointEvent(
                    run_id=spec.run_id,
                    step=step,
                    path=str(path),
                    train_loss=1.0,
                    train_accuracy=0.5,
                    valid_loss=float("inf"),
                    valid_accuracy=0.5,
                )
            )
        gone = [type(made[0])(**{**_fields(made[0]), "step": 9, "path": str(Path(spec.workdir) / "gone")})]
        return [*[one for one in before if not isinstance(one, CheckpointEvent)], *made, *gone, last]

    script.training = many  # a run with more checkpoints
    job = await until(control, acme, (await create_job(control, acme, name="desk")).id)
    kept = (await control.jobs.checkpoints(acme, job.id)).items
    assert [one.step_number for one in kept] == [5, 4, 3]
    assert "valid_loss" not in kept[0].metrics
    assert len(list((home / "adapters").glob("??/*"))) == 4
    await control.adapters.delete(acme, "desk")
    assert list((home / "adapters").glob("??/*")) == []
    assert (await control.jobs.checkpoints(acme, job.id)).items == []
    with pytest.raises(ModelNotFoundError):
        await control.inference.resolve(acme, kept[0].fine_tuned_model_checkpoint, None)


def _replace_seed(spec: Any, seed: int) -> Any:
    return msgspec.structs.replace(spec, seed=seed)


def _fields(event: Any) -> dict[str, Any]:
    return {name: getattr(event, name) for name in event.__struct_fields__}


async def test_a_result_can_be_deleted_by_its_ft_name(
    control: Control, acme: Principal, umbrella: Principal, script: JobScript, home: Path
) -> None:
    first = await until(control, acme, (await create_job(control, acme, name="desk", seed=1)).id)
    script.loss /= 2
    second = await until(control, acme, (await create_job(control, acme, name="desk", seed=2)).id)
    assert first.fine_tuned_model is not None
    assert second.fine_tuned_model is not None
    with pytest.raises(ModelNotFoundError):
        await control.models.delete(umbrella, first.fine_tuned_model)
    with pytest.raises(ConflictError, match="roll back"):
        await control.models.delete(acme, second.fine_tuned_model)
    await control.models.delete(acme, first.fine_tuned_model)
    assert [one.version for one in await control.adapters.versions(acme, "desk")] == [2]
    await control.models.delete(acme, second.fine_tuned_model)
    assert [card.id for card in await control.models.list(acme)] == [BASE]
    assert list((home / "adapters").glob("??/*")) == []
    assert (await control.jobs.get(acme, first.id)).fine_tuned_model == first.fine_tuned_model
    with pytest.raises(ModelNotFoundError):
        await control.models.get(acme, first.fine_tuned_model)
