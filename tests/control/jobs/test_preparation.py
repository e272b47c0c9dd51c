"""How a job's rows are divided before it trains: by content, without leaks between files, nothing in silence."""

from __future__ import annotations

from typing import Any

from tenora.control.control import Control
from tenora.control.jobs.records import JobRequest
from tenora.control.tenancy.records import Principal
from tenora.data.dataset import TokenizedDataset
from tenora.training.corpus import Corpus
from tenora.training.methods.table import find_method
from tenora.training.settings import RowSettings
from tests.control.conftest import BASE, MANY_ROWS, create_job, messages, until, upload
from tests.support.scripted_jobs import JobScript


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


async def corpus_of(control: Control, who: Principal, script: JobScript, **fields: Any) -> Corpus:
    """What a job trains on and is measured on."""
    script.hold_at = 1
    job = await create_job(control, who, **fields)
    await script.until_held()
    spec = script.specs[-1]
    corpus = Corpus.load(spec.tasks, kind=find_method(spec.method).rows)
    if spec.folds:
        corpus, _ = corpus.fold(0, spec.folds, seed=spec.split_seed)
    await control.jobs.cancel(who, job.id)
    return corpus


def contents(rows: TokenizedDataset) -> list[list[int]]:
    return sorted(rows.row(index)[0].tolist() for index in range(len(rows)))


async def test_two_jobs_on_the_same_rows_hold_out_the_same_unless_a_seed_is_given(
    control: Control, acme: Principal, script: JobScript
) -> None:
    for rows in (MANY_ROWS, MANY_ROWS[:20]):  # held out once, and in folds
        first, again = await upload(control, acme, rows), await upload(control, acme, rows[::-1])
        sides = [await corpus_of(control, acme, script, training_file=file.id) for file in (first, again)]
        assert contents(sides[0].valid) == contents(sides[1].valid)
        assert contents(sides[0].train) == contents(sides[1].train)
        seeded = [await corpus_of(control, acme, script, training_file=first.id, seed=seed) for seed in (7, 7, 8)]
        assert contents(seeded[0].valid) == contents(seeded[1].valid) != contents(seeded[2].valid)
        assert contents(seeded[0].valid) != contents(sides[0].valid)


async def test_the_seed_that_a_job_shows_makes_it_again(control: Control, acme: Principal, script: JobScript) -> None:
    file = await upload(control, acme, MANY_ROWS)
    first = await corpus_of(control, acme, script, training_file=file.id)
    shown = (await control.jobs.list(acme)).items[0].seed
    again = await corpus_of(control, acme, script, training_file=file.id, seed=shown)
    assert contents(first.valid) == contents(again.valid)
    assert [spec.seed for spec in script.specs] == [shown, shown]


async def test_doubled_rows_do_not_leak_between_folds_or_tasks(
    control: Control, acme: Principal, script: JobScript
) -> None:
    few = await upload(control, acme, [*MANY_ROWS[:12], *MANY_ROWS[:12]])
    folded = await corpus_of(control, acme, script, training_file=few.id)
    assert not {tuple(row) for row in contents(folded.train)} & {tuple(row) for row in contents(folded.valid)}
    one, other = await upload(control, acme, MANY_ROWS), await upload(control, acme, MANY_ROWS[::-1])
    sources = [{"file": one.id, "name": "one"}, {"file": other.id, "name": "other"}]
    tasks = await corpus_of(control, acme, script, training_file=None, training_files=sources)
    assert len(tasks.valid) == 12
    assert not {tuple(row) for row in contents(tasks.train)} & {tuple(row) for row in contents(tasks.valid)}


async def test_near_duplicates_in_another_file_of_the_job_are_named_with_it(
    control: Control, acme: Principal, script: JobScript
) -> None:
    """Rows that are all alike cannot be kept apart: what is measured is trained on, and that is said."""
    one, other = await upload(control, acme, MANY_ROWS), await upload(control, acme, [MANY_ROWS[0]] * 4)
    sources = [{"file": one.id, "name": "one"}, {"file": other.id, "name": "other"}]
    asked = JobRequest(model=BASE, training_files=sources)
    found = await control.estimates.estimate(acme, asked)
    alike = found.tasks[1]
    assert alike.near_duplicates == alike.held_out_rows == 1
    assert alike.near_duplicate_pairs[0].train_task in ("one", "other")
    job = await control.jobs.create(acme, asked)
    await until(control, acme, job.id, "succeeded")
    (warning,) = [line for line in await messages(control, acme, job.id) if "near-duplicates" in line]
    assert warning.startswith("Task other: 1 of 1 held-out rows are near-duplicates")
    assert warning.endswith((" of one", " of other"))


async def test_pairs_that_are_equal_once_they_are_cut_are_left_out_and_counted(
    control: Control, acme: Principal, script: JobScript
) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}."} for n in range(60)]
    long = "and so on " * 40
    rows += [{"prompt": f"{n}?", "chosen": f"{long} yes", "rejected": f"{long} no"} for n in range(3)]
    file = await upload(control, acme, rows)
    settings: dict[str, Any] = {"method": {"type": "dpo"}, "max_seq_length": 32, "truncate": True}
    found = await control.estimates.estimate(acme, JobRequest(model=BASE, training_file=file.id, **settings))
    assert (found.left_out, found.rows + found.held_out_rows) == (3, 60)
    job = await create_job(control, acme, training_file=file.id, **settings)
    await until(control, acme, job.id, "succeeded")
    assert "3 pairs were left out: their two answers are equal as the model sees them" in await messages(
        control, acme, job.id
    )
    preview = await control.previews.preview(
        acme, file.id, limit=9, after=60, rows=RowSettings(max_seq_length=32, truncate=True)
    )
    assert {issue.code for row in preview.rows for issue in row.issues} == {"no_trainable_tokens"}
    assert "left out" in preview.rows[0].issues[0].message
