"""Few-shot, several tasks and preferences: what a job makes of its files, and what its log and results say."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from tenora.control.control import Control
from tenora.control.jobs.records import JobRecord, JobRequest
from tenora.control.tenancy.records import Principal
from tenora.data.dataset import TokenizedDataset
from tenora.engine.client.client import AsyncEngine
from tenora.errors import ConflictError, InvalidRequestError, NotFoundError
from tenora.training.events import FoldEvent, TrainEvent
from tenora.training.spec import TaskSpec, TrainSpec
from tests.control.conftest import (
    BASE,
    MANY_ROWS,
    ROWS,
    OpenControl,
    content_of,
    create_job,
    jsonl,
    messages,
    pieces,
    tenant,
    until,
    until_told,
    until_true,
    upload,
    without_engine,
)
from tests.support.scripted_jobs import JobScript

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": "I do not know."} for i in range(20)]
OPENAI_PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"Question {i}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"Answer {i}."}],
        "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
    }
    for i in range(20)
]


class Rows:
    """Loads what runs are given before it is removed."""

    def __init__(self, script: JobScript) -> None:
        self.of: dict[str, list[tuple[TokenizedDataset, TokenizedDataset | None]]] = {}
        self._write = script.write
        script.write = self._look  # type: ignore[method-assign]  # looks at what the run is given

    def _look(self, path: Path, spec: TrainSpec) -> None:
        self.of[spec.run_id] = [self._load(task) for task in spec.tasks]
        self._write(path, spec)

    @staticmethod
    def _load(task: TaskSpec) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        valid = TokenizedDataset.load(Path(task.valid_path)) if task.valid_path else None
        return TokenizedDataset.load(Path(task.train_path)), valid


@pytest.fixture
def rows(script: JobScript) -> Rows:
    return Rows(script)


async def finish(control: Control, who: Principal, content: list[dict[str, Any]], **fields: Any) -> JobRecord:
    file = await upload(control, who, content)
    job = await until(control, who, (await create_job(control, who, training_file=file.id, **fields)).id)
    assert job.status == "succeeded", job.error
    return job


async def test_few_rows_are_all_learned_and_the_steps_cross_validated(
    control: Control, acme: Principal, script: JobScript, rows: Rows
) -> None:
    job = await finish(control, acme, ROWS)
    (spec,) = script.specs
    assert (spec.folds, spec.lora.rank, spec.lora.alpha, spec.tasks[0].valid_path) == (5, 8, 16.0, "")
    assert spec.n_epochs > 3
    assert spec.batch_size == 4
    assert [(len(train), valid) for train, valid in rows.of[job.id]] == [(20, None)]
    assert job.hyperparameters["n_epochs"] == spec.n_epochs
    said = await messages(control, acme, job.id)
    assert any("5-fold cross-validation chooses the number of steps" in line for line in said)
    assert "Files validated (20 rows to train on), moving job to queued state" in said
    await finish(control, acme, ROWS[:3], lora={"rank": 4}, n_epochs=2)
    assert (script.specs[1].folds, script.specs[1].lora.rank, script.specs[1].n_epochs) == (3, 4, 2)


async def test_folds_are_told_and_the_end_is_estimated_while_they_run(
    control: Control, acme: Principal, script: JobScript
) -> None:
    events, script.hold_at = script.training, 1

    def with_folds(spec: TrainSpec) -> list[TrainEvent]:
        folds: list[TrainEvent] = [
            FoldEvent(
                run_id=spec.run_id,
                fold=fold,
                step=2 * (half + 1),
                total_steps=4,
                valid_loss=2.5 - half,
                base_loss=3.0,
                trained_tokens=(half * spec.folds + fold + 1) * 100,
                done=(half * spec.folds + fold + 1) / (2 * spec.folds),
            )
            for half in range(2)
            for fold in range(spec.folds)
        ]
        return [*folds, *events(spec)]

    script.training = with_folds
    made = await create_job(control, acme)
    await script.until_held()  # before the first step of the fit on all rows
    job = await until_told(control, acme, made.id, lambda job: job.trained_tokens == 1000)
    assert job.estimated_finish is not None
    assert made.created_at <= job.estimated_finish < made.created_at + 60
    said = await messages(control, acme, job.id)
    assert "Fold 2/5, step 2/4: validation loss=2.50 (base 3.00)" in said
    assert said.index("Fold 5/5: validation loss=1.50 (base 3.00)") > said.index(
        "Fold 1/5: validation loss=1.50 (base 3.00)"
    )
    script.go_on()
    job = await until(control, acme, made.id)
    assert job.status == "succeeded", job.error
    metrics = [event.data for event in (await control.jobs.events(acme, job.id, limit=100)).items if event.data]
    (last,) = [one for one in metrics if (one.get("fold"), one.get("fold_step")) == (4, 4)]
    assert (last["folds_done"], last["fold_valid_loss"], last["trained_tokens"]) == (1.0, 1.5, 1000)
    table = csv.DictReader((await content_of(control, acme, job.result_files[0])).decode().splitlines())
    assert [(row["step"], row["valid_loss"]) for row in table] == [
        ("0", "3.0"),
        *((str(step), "") for step in range(1, 4)),
        ("4", "1.5"),
    ], "the fit on all rows"


async def test_enough_rows_or_a_validation_file_hold_rows_out(
    control: Control, acme: Principal, script: JobScript
) -> None:
    valid = await upload(control, acme, MANY_ROWS[:5])
    await finish(control, acme, MANY_ROWS)
    await finish(control, acme, ROWS, validation_file=valid.id)
    for spec in script.specs:
        assert (spec.folds, spec.lora.rank, bool(spec.tasks[0].valid_path)) == (0, 16, True)


async def test_several_files_are_tasks(control: Control, acme: Principal, script: JobScript, rows: Rows) -> None:
    async def file(name: str, count: int) -> str:
        content = jsonl(MANY_ROWS[:count])
        return (await control.files.create(acme, filename=name, purpose="fine-tune", chunks=pieces(content, 4096))).id

    ids = [await file("Q & A.jsonl", 60), await file("Q & A.jsonl", 20), await file("third", 10)]
    listed = [{"file": ids[0]}, {"file": ids[1], "weight": 3}, {"file": ids[2], "weight": 0.5, "name": "defs"}]
    made = await control.jobs.create(acme, JobRequest(model=BASE, training_files=listed, batch_size=4))
    assert made.training_file == ids[0]
    assert made.training_files == [
        {"file": ids[0], "weight": 1.0, "name": "Q-A"},
        {"file": ids[1], "weight": 3.0, "name": "Q-A-2"},
        {"file": ids[2], "weight": 0.5, "name": "defs"},
    ]
    job = await until(control, acme, made.id)
    assert job.status == "succeeded", job.error
    (spec,) = script.specs
    assert [(task.name, task.weight) for task in spec.tasks] == [("Q-A", 1.0), ("Q-A-2", 3.0), ("defs", 0.5)]
    assert (spec.folds, spec.lora.rank) == (0, 16)  # no folds of several tasks
    sizes = [(len(train), 0 if valid is None else len(valid)) for train, valid in rows.of[job.id]]
    # The rows of the small files are the first one's, too: what one of them measures on, none of them learns.
    assert sizes == [(52, 8), (16, 4), (7, 3)]
    said = await messages(control, acme, job.id)
    assert "Task Q-A-2: 16 rows to train on, 4 held out, weight 3" in said
    assert "Files validated (75 rows to train on, 15 held out), moving job to queued state" in said
    assert [line for line in said if "Validating" in line] == [f"Validating training file: {one}" for one in ids]
    metrics = [event.data for event in (await control.jobs.events(acme, job.id, limit=100)).items]
    last = next(found for found in metrics if "valid_loss/Q-A" in found)
    assert {"valid_loss/Q-A": 1.0, "valid_loss/Q-A-2": 2.0, "valid_loss/defs": 3.0}.items() <= last.items()
    lines = (await content_of(control, acme, job.result_files[0])).decode().splitlines()
    table = list(csv.DictReader(lines))
    assert lines[0].endswith("valid_mean_token_accuracy,valid_loss/Q-A,valid_loss/Q-A-2,valid_loss/defs")
    assert (table[-1]["valid_loss/defs"], table[1]["valid_loss/defs"]) == ("3.0", "")


async def test_a_file_of_the_list_that_cannot_be_used_is_named(
    control: Control, acme: Principal, umbrella: Principal
) -> None:
    good, theirs = await upload(control, acme), await upload(control, umbrella)
    long = [{"messages": [{"role": "user", "content": "long " * 400}, {"role": "assistant", "content": "x"}]}]
    bad = await upload(control, acme, [*ROWS[:4], *long])
    for files, param, error in (
        ([], "training_files", InvalidRequestError),
        ([{"file": good.id}] * 17, "training_files", InvalidRequestError),
        ([{"file": good.id}, {"file": good.id}], "training_files[1].file", InvalidRequestError),
        ([{"file": good.id, "weight": 0}], "training_files[0].weight", InvalidRequestError),
        ([{"file": good.id, "share": 1}], "training_files[0].share", InvalidRequestError),
        ([{"file": good.id, "name": "a b"}], "training_files[0].name", InvalidRequestError),
        ([{"file": "a", "name": "x"}, {"file": "b", "name": "x"}], "training_files[1].name", InvalidRequestError),
        ([{"file": good.id}, {"file": theirs.id}], "training_files[1].file", NotFoundError),
        ([{"weight": 1}], "training_files[0].file", InvalidRequestError),
    ):
        with pytest.raises(error) as caught:
            await control.jobs.create(acme, JobRequest(model=BASE, training_files=files))
        assert caught.value.param == param
    for request in (
        JobRequest(model=BASE),
        JobRequest(model=BASE, training_file=good.id, training_files=[{"file": good.id}]),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await control.jobs.create(acme, request)
        assert caught.value.param == "training_file"
    both = [{"file": good.id}, {"file": bad.id}]
    with pytest.raises(InvalidRequestError) as caught:
        await control.jobs.create(acme, JobRequest(model=BASE, training_files=both, validation_file=good.id))
    assert caught.value.param == "validation_file"
    made = await control.jobs.create(acme, JobRequest(model=BASE, training_files=both))
    job = await until(control, acme, made.id)
    assert job.error is not None
    assert (job.status, job.error["param"]) == ("failed", "training_files[1]")
    assert "line 5" in job.error["message"]


async def test_all_files_of_an_unfinished_job_are_kept(open_control: OpenControl, script: JobScript) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    first, second = await upload(control, acme), await upload(control, acme)
    script.hold_at = 2
    listed = [{"file": first.id}, {"file": second.id}]
    job = await control.jobs.create(acme, JobRequest(model=BASE, training_files=listed))
    await script.until_held()
    for file in (first, second):
        with pytest.raises(ConflictError, match=job.id):
            await control.files.delete(acme, file.id)
    script.go_on()
    await until(control, acme, job.id)
    await control.files.delete(acme, second.id)


@pytest.mark.parametrize("content", [PAIRS, OPENAI_PAIRS], ids=["trl", "openai"])
async def test_preferences(
    control: Control, acme: Principal, script: JobScript, rows: Rows, content: list[dict[str, Any]]
) -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    job = await finish(control, acme, content, method=method)
    (spec,) = script.specs
    assert (spec.method, spec.method_settings["beta"], spec.learning_rate, spec.n_epochs) == ("dpo", 0.2, 5e-5, 1)
    assert spec.folds == 0  # never of pairs
    ((train, valid),) = rows.of[job.id]
    assert valid is not None
    assert (train.rows_per_example, len(train), len(valid)) == (2, 32, 8)
    assert job.method == method
    assert job.hyperparameters == {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 1.0, "beta": 0.2}
    metrics = [event.data for event in (await control.jobs.events(acme, job.id, limit=100)).items if event.data]
    assert metrics[0]["rewards/margins"] == 1.0
    assert (metrics[1]["rewards/chosen"], metrics[1]["rewards/rejected"]) == (0.5, -0.5)


async def test_auto_beta_is_a_tenth(control: Control, acme: Principal, script: JobScript) -> None:
    for method in ({"type": "dpo"}, {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}):
        job = await finish(control, acme, PAIRS, method=method)
        assert (script.specs[-1].method_settings["beta"], job.hyperparameters["beta"]) == (0.1, 0.1)


async def test_rows_of_another_method_are_refused_with_what_to_do(control: Control, acme: Principal) -> None:
    for content, method, hint in ((ROWS, {"type": "dpo"}, "method supervised"), (PAIRS, None, '{"type": "dpo"}')):
        file = await upload(control, acme, content)
        job = await until(control, acme, (await create_job(control, acme, training_file=file.id, method=method)).id)
        assert job.error is not None
        assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
        assert hint in job.error["message"]


async def test_early_stopping_and_other_settings_reach_the_run(
    control: Control, acme: Principal, script: JobScript
) -> None:
    for asked, evaluations in ((None, 0), (False, 0), (0, 0), (True, 3), (5, 5)):
        job = await finish(control, acme, ROWS, early_stopping=asked)
        assert script.specs[-1].early_stopping == job.settings["early_stopping"] == evaluations
    fields = {"packing": False, "eval_interval": 7, "max_steps": 9, "warmup_ratio": 0.0, "weight_decay": 0.1}
    job = await finish(control, acme, ROWS, max_grad_norm=0.5, max_seq_length=64, truncate=True, **fields)
    spec = script.specs[-1]
    assert {name: getattr(spec, name) for name in fields} == fields
    assert spec.max_grad_norm == 0.5
    assert {name: job.settings[name] for name in fields} == fields
    assert (job.settings["max_seq_length"], job.settings["truncate"]) == (64, True)
    assert (job.settings["scheduler"], job.settings["learning_rate"]) == ("cosine", 5e-4)


async def test_rows_read_again_give_the_same_run(
    open_control: OpenControl, engine: AsyncEngine, script: JobScript, home: Path
) -> None:
    """What is shown has numbers by then; what was asked for has not changed, so nothing clashes with itself."""
    control = await open_control()
    acme = await tenant(control, "acme")
    await without_engine(engine, script)
    job = await create_job(control, acme, learning_rate=1e-3, lora={"rank": 4}, early_stopping=True)
    queued = await until(control, acme, job.id, "queued")
    await control.close()
    shutil.rmtree(home / "tenants" / acme.tenant_id / "jobs" / job.id)
    script.come_back()
    control = await open_control()
    done = await until(control, acme, job.id)
    assert done.status == "succeeded", done.error
    assert (done.hyperparameters, done.lora, done.settings) == (queued.hyperparameters, queued.lora, queued.settings)
    await until_true(lambda: not control._runner._works)


@pytest.mark.parametrize("fields", [{}, {"sweep": {"rank": [2, 4, 8]}}], ids=["steps", "trials"])
async def test_the_end_is_estimated_while_a_job_runs(
    control: Control, acme: Principal, script: JobScript, fields: dict[str, Any]
) -> None:
    script.hold_at = 4
    made = await create_job(control, acme, **fields)
    assert made.estimated_finish is None
    await script.until_held()
    job = await until_told(control, acme, made.id, lambda job: job.estimated_finish is not None)
    assert job.estimated_finish is not None
    assert made.created_at <= job.estimated_finish < made.created_at + 60
    assert (await control.jobs.pause(acme, made.id)).estimated_finish is None
