"""An estimate says what the job then does, and stores nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tenora.control.control import Control
from tenora.control.jobs.records import JobRequest
from tenora.control.tenancy.records import Principal
from tenora.errors import DatasetError, InvalidRequestError, NotFoundError
from tenora.training.corpus import Corpus
from tenora.training.methods.table import find_method
from tenora.training.packing import pack
from tenora.training.settings import BY_THEMSELVES
from tests.control.conftest import BASE, MANY_ROWS, create_job, messages, until, upload, workdir
from tests.support.scripted_jobs import JobScript

PAIRS = [{"prompt": f"Question {n}? ", "chosen": f"Yes, {n}.", "rejected": "No."} for n in range(60)]


async def request(control: Control, who: Principal, rows: Any = MANY_ROWS, **fields: Any) -> JobRequest:
    if "training_files" not in fields:
        fields["training_file"] = (await upload(control, who, rows)).id
    return JobRequest(model=BASE, seed=5, **fields)


async def prepared_corpus(control: Control, who: Principal, script: JobScript, asked: JobRequest) -> Corpus:
    """What the job of the same request would train on."""
    script.hold_at = 1
    job = await control.jobs.create(who, asked)
    await until(control, who, job.id, "running")
    await script.until_held()
    spec = script.specs[-1]
    corpus = Corpus.load(spec.tasks, kind=find_method(spec.method).rows)
    await control.jobs.cancel(who, job.id)
    script.go_on()
    return corpus


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (MANY_ROWS, {}),
        (MANY_ROWS, {"n_epochs": 2, "batch_size": 7}),
        (MANY_ROWS, {"max_steps": 5}),
        (PAIRS, {"method": {"type": "dpo"}}),
    ],
)
async def test_it_is_what_the_job_then_does(
    control: Control, acme: Principal, script: JobScript, rows: Any, fields: dict[str, Any]
) -> None:
    asked = await request(control, acme, rows, **fields)
    found = await control.estimates.estimate(acme, asked)
    corpus = await prepared_corpus(control, acme, script, asked)
    spec = script.specs[-1]
    assert [found.settings[name] for name in BY_THEMSELVES] == [getattr(spec, name) for name in BY_THEMSELVES]
    assert (found.rows, found.held_out_rows) == (corpus.train.examples, corpus.valid.examples)
    assert (found.tokens, found.trained_tokens) == (corpus.train.num_tokens, corpus.train.num_trained)
    per_epoch = corpus.steps_per_epoch(spec.batch_size)
    assert found.steps == (spec.max_steps or spec.n_epochs * per_epoch)
    read = pack(corpus.train, range(len(corpus.train))).tokens
    assert found.read_tokens == round(read * found.steps / per_epoch)
    assert (found.folds, found.trials) == (0, 0)
    assert found.evaluations == 1 + math.ceil(found.steps / per_epoch)
    held_out = pack(corpus.valid, range(len(corpus.valid))).row_tokens
    reference = min(read, found.read_tokens) if spec.method == "dpo" else 0
    assert found.measured_tokens == found.evaluations * (held_out + len(spec.general_text) - 1) + reference


async def test_several_files_count_by_their_weights(control: Control, acme: Principal, script: JobScript) -> None:
    files = [(await upload(control, acme, MANY_ROWS[:count])).id for count in (60, 40)]
    listed = [{"file": files[0], "name": "a"}, {"file": files[1], "name": "b", "weight": 0.5}]
    asked = await request(control, acme, training_files=listed)
    found = await control.estimates.estimate(acme, asked)
    corpus = await prepared_corpus(control, acme, script, asked)
    assert [(task.name, task.file, task.weight) for task in found.tasks] == [("a", files[0], 1.0), ("b", files[1], 0.5)]
    assert found.rows == corpus.train.examples == sum(task.rows for task in found.tasks)
    spec = script.specs[-1]
    assert found.steps == spec.n_epochs * corpus.steps_per_epoch(spec.batch_size)
    assert found.read_tokens < found.tokens * spec.n_epochs


async def test_few_rows_and_sweeps_count_all_that_is_trained(control: Control, acme: Principal) -> None:
    few = await control.estimates.estimate(acme, await request(control, acme, MANY_ROWS[:20], n_epochs=4, batch_size=4))
    assert (few.rows, few.held_out_rows, few.folds) == (20, 0, 5)
    assert few.steps == 5 * 4 * 4 + 4 * 5  # five fits on 16 rows, one on 20, four epochs each
    capped = await control.estimates.estimate(acme, await request(control, acme, MANY_ROWS[:20], max_steps=3))
    assert (capped.folds, capped.steps) == (5, 6 * 3)
    one = await control.estimates.estimate(acme, await request(control, acme, n_epochs=3, batch_size=8))
    sweep = {"rank": [4, 8], "learning_rate": [1e-4, 5e-4, 1e-3]}
    many = await control.estimates.estimate(acme, await request(control, acme, n_epochs=3, batch_size=8, sweep=sweep))
    assert (many.trials, many.settings["n_epochs"]) == (6, 3)
    # Six to a sixth, two to a half, one to the end.
    assert many.read_tokens == pytest.approx(one.read_tokens * (6 / 6 + 2 / 3 + 1 / 2), rel=1e-3)
    swept = await control.estimates.estimate(acme, await request(control, acme, sweep={"n_epochs": [1, 2]}))
    assert (swept.settings["n_epochs"], swept.trials) == ("auto", 2)


async def test_time_comes_from_measured_speed_alone(control: Control, acme: Principal, umbrella: Principal) -> None:
    asked = await request(control, acme)
    before = await control.estimates.estimate(acme, asked)
    assert (before.measured, before.seconds, before.tokens_per_second) == (False, None, None)
    job = await create_job(control, umbrella)
    await until(control, umbrella, job.id, "succeeded")
    after = await control.estimates.estimate(acme, asked)
    assert (after.measured, after.tokens_per_second) == (True, 100.0)  # what the scripted engine says
    assert after.seconds == (after.read_tokens + after.measured_tokens / 3) / 100.0


async def test_nothing_is_stored(control: Control, acme: Principal, home: Path) -> None:
    await control.estimates.estimate(acme, await request(control, acme))
    assert (await control.jobs.list(acme)).items == []
    assert not workdir(home, acme, "").exists()


async def test_it_fails_as_the_job_would(control: Control, acme: Principal, umbrella: Principal) -> None:
    asked = await request(control, acme)
    with pytest.raises(NotFoundError):
        await control.estimates.estimate(umbrella, asked)
    with pytest.raises(InvalidRequestError) as caught:
        await control.estimates.estimate(acme, JobRequest(model=BASE, training_file=asked.training_file, n_epochs=0))
    assert caught.value.param == "n_epochs"
    with pytest.raises(DatasetError, match="too_long") as rows:
        await control.estimates.estimate(
            acme, JobRequest(model=BASE, training_file=asked.training_file, max_seq_length=8)
        )
    assert rows.value.param == "training_file"
    for method, given, words in (("dpo", MANY_ROWS, "needs preference"), ("supervised", PAIRS, "holds preference")):
        wrong = await request(control, acme, given, method={"type": method})
        with pytest.raises(DatasetError, match=words) as kind:
            await control.estimates.estimate(acme, wrong)
        assert kind.value.param == "training_file"


async def test_leaks_between_the_sides_are_counted_and_the_job_warns(
    control: Control, acme: Principal, script: JobScript
) -> None:
    rows = [*MANY_ROWS, MANY_ROWS[3], MANY_ROWS[7]]
    valid = await upload(control, acme, [MANY_ROWS[3], {"text": ""}, MANY_ROWS[3]][::2])
    asked = await request(control, acme, rows, validation_file=valid.id)
    found = await control.estimates.estimate(acme, asked)
    assert found.near_duplicates == 2
    assert [(p.train_line, p.held_out_line) for p in found.tasks[0].near_duplicate_pairs] == [(4, 1), (4, 2)]
    job = await control.jobs.create(acme, asked)
    await until(control, acme, job.id, "succeeded")
    (warning,) = [line for line in await messages(control, acme, job.id) if "near-duplicates" in line]
    assert warning.startswith("2 of 2 held-out rows are near-duplicates of training rows, 2 of them equal to one")
    assert warning.endswith("1 and 4, 2 and 4")
