"""A result takes its name over where it is better than what the name means, and otherwise says why it does not."""

from __future__ import annotations

import asyncio
import io
import zipfile
from typing import Any

import numpy as np
import pytest

from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME
from tenora.control.adapters.model_card import README_NAME
from tenora.control.adapters.row_record import RowRecord
from tenora.control.control import Control
from tenora.control.gate.card import Comparison, Replaced
from tenora.control.gate.takeover import Code, decide
from tenora.control.jobs.records import JobEventRecord, JobRecord, JobRequest
from tenora.control.tenancy.records import Principal
from tenora.control.worker import publication
from tenora.errors import InvalidRequestError, NotFoundError
from tenora.training.settings import Publish
from tests.control.conftest import BASE, MANY_ROWS, ROWS, ImportAdapter, archive_of, create_job, until, upload
from tests.control.jobs.test_job_methods import PAIRS
from tests.support.scripted_jobs import JobScript

OTHER_ROWS = [
    {"messages": [{"role": "user", "content": f"Riddle {i}?"}, {"role": "assistant", "content": f"Solution {i}."}]}
    for i in range(60)
]


def compared(difference: float, verdict: str = "no difference") -> Comparison:
    low, high = difference - 0.1, difference + 0.1
    values = {"adapter_loss": 2.0 + difference, "other_loss": 2.0, "difference": difference, "low": low, "high": high}
    return Comparison(rows=9, tokens=90, verdict=verdict, **values)  # type: ignore[arg-type]  # one of the words


@pytest.mark.parametrize(
    ("publish", "min_gain", "difference", "moves", "code", "warns"),
    [
        ("if_better", 0.0, -0.01, True, "better", False),
        ("if_better", 0.0, 0.0, False, "not_better", True),
        ("if_better", 0.0, 0.3, False, "not_better", True),
        ("if_better", 0.0, float("nan"), False, "not_better", True),
        ("if_better", 0.05, -0.04, False, "below_min_gain", True),
        ("if_better", 0.05, -0.05, True, "better", False),
        ("if_better", 0.0, None, False, "not_measured", True),
        ("always", 0.0, 0.3, True, "always", True),
        ("always", 0.0, -0.3, True, "always", False),
        ("always", 0.0, None, True, "always", True),
        ("never", 0.0, -0.3, False, "never", False),
    ],
)
def test_the_rule(
    publish: Publish, min_gain: float, difference: float | None, moves: bool, code: Code, warns: bool
) -> None:
    comparison = None if difference is None else compared(difference)
    replaced = Replaced(name="desk", version=3, digest="aa", comparison=comparison)
    found = decide(publish, min_gain, digest="bb", replaced=replaced, base=compared(-0.5), why_not="no rows.")
    assert (found.moves, found.code, found.warns) == (moves, code, warns)
    if publish != "never":
        assert "desk" in found.reason
        assert "version 3" in found.reason
    if difference is None:
        assert found.reason.endswith("no rows.")


@pytest.mark.parametrize(
    ("min_gain", "difference", "moves", "code", "warns"),
    [
        (0.0, -0.1, True, "first_version", False),
        (0.0, 0.1, True, "first_version", True),
        (0.0, None, True, "first_version", False),
        (0.2, -0.1, False, "below_min_gain", True),
        (0.2, -0.3, True, "first_version", False),
        (0.2, None, False, "not_measured", True),
    ],
)
def test_a_new_name_is_held_against_the_base(
    min_gain: float, difference: float | None, moves: bool, code: Code, warns: bool
) -> None:
    base = None if difference is None else compared(difference)
    found = decide("if_better", min_gain, digest="bb", replaced=None, base=base, why_not=None)
    assert (found.moves, found.code, found.warns) == (moves, code, warns)


def test_equal_weights_take_nothing_over() -> None:
    same = Replaced(name="desk", version=1, digest="aa", comparison=None)
    found = decide("if_better", 0.0, digest="aa", replaced=same, base=None, why_not=None)
    assert (found.moves, found.code) == (False, "same_weights")


async def train(control: Control, who: Principal, rows: list[dict[str, Any]] | None = None, **fields: Any) -> JobRecord:
    file = await upload(control, who, MANY_ROWS if rows is None else rows)
    made = await create_job(control, who, **{"training_file": file.id, "name": "desk", "seed": 1, **fields})
    job = await until(control, who, made.id)
    assert job.status == "succeeded", job.error
    return job


async def warnings(control: Control, who: Principal, job: JobRecord) -> list[str]:
    events: list[JobEventRecord] = list((await control.jobs.events(who, job.id, limit=1000)).items)
    return [event.message for event in events if event.level == "warn"]


async def means(control: Control, who: Principal, name: str = "desk") -> int:
    return (await control.adapters.get(who, name)).version


async def test_a_worse_result_is_stored_and_does_not_take_the_name_over(
    control: Control, acme: Principal, script: JobScript
) -> None:
    good = await train(control, acme)
    assert good.published is not None
    assert (good.published["alias_moved"], good.published["code"]) == (True, "first_version")
    script.loss = 0.7
    bad = await train(control, acme, seed=1, learning_rate=0.5)
    assert await means(control, acme) == 1
    said = bad.published
    assert said is not None
    assert (said["alias_moved"], said["version"], said["code"]) == (False, 2, "not_better")
    assert said["replaced"]["version"] == 1
    assert said["replaced"]["comparison"]["difference"] == pytest.approx(0.2)
    assert said["replaced"]["comparison"]["verdict"] == "worse"
    (warning,) = await warnings(control, acme, bad)
    for part in ("desk still means version 1", str(bad.fine_tuned_model), f"desk@{said['digest'][:12]}", "rollback"):
        assert part in warning
    for name in (str(bad.fine_tuned_model), f"desk@{said['digest'][:12]}"):
        target = await control.inference.resolve(acme, name, None)
        assert target.adapter is not None
        assert target.adapter.digest == said["digest"]
    kept = await control.inference.resolve(acme, "desk", None)
    assert kept.adapter is not None
    assert kept.adapter.digest == good.published["digest"]

    await control.adapters.rollback(acme, "desk", 2)  # whoever wants it all the same
    assert await means(control, acme) == 2


async def test_a_better_result_takes_the_name_over_and_says_by_how_much(
    control: Control, acme: Principal, script: JobScript
) -> None:
    await train(control, acme)
    script.loss = 0.4
    better = await train(control, acme, seed=1, learning_rate=1e-4)
    assert (await means(control, acme), await warnings(control, acme, better)) == (2, [])
    assert better.published is not None
    assert (better.published["alias_moved"], better.published["code"]) == (True, "better")
    assert better.published["replaced"]["comparison"]["difference"] == pytest.approx(-0.1)
    assert better.evaluation is not None
    assert better.evaluation["verdicts"]["replaced"]["verdict"] == "better"
    assert better.evaluation["lineage"]["settings"]["publish"] == "if_better"


async def test_rows_that_the_version_in_use_was_measured_on_are_not_scored_again(
    control: Control, acme: Principal, script: JobScript
) -> None:
    await train(control, acme)
    before = len(script.scored)
    script.loss = 0.4
    await train(control, acme, seed=1, learning_rate=1e-4)
    again = [request for request in script.scored[before:] if request.adapter is not None]
    assert again == []


async def test_rows_that_the_version_in_use_has_learned_are_left_out_of_the_comparison(
    control: Control, acme: Principal, script: JobScript
) -> None:
    """Of the 12 rows to measure on it has learned 4, and would shine there."""
    valid = (await upload(control, acme, [*MANY_ROWS[:4], *OTHER_ROWS[:8]])).id
    await train(control, acme, validation_file=(await upload(control, acme, OTHER_ROWS[20:30])).id)
    before = len(script.scored)
    job = await train(control, acme, OTHER_ROWS[30:], validation_file=valid, learning_rate=1e-5)
    assert job.published is not None
    assert job.published["replaced"]["comparison"]["rows"] == 8
    assert job.published["alias_moved"]
    asked = [request for request in script.scored[before:] if request.adapter is not None]
    assert len(asked) == 8
    assert job.evaluation is not None
    assert any("4 held-out rows that version 1 of desk has learned" in note for note in job.evaluation["notes"])


async def test_where_every_row_was_learned_the_name_stays(control: Control, acme: Principal, script: JobScript) -> None:
    await train(control, acme, validation_file=(await upload(control, acme, OTHER_ROWS[:10])).id)
    script.loss = 0.1
    valid = (await upload(control, acme, MANY_ROWS[:10])).id
    job = await train(control, acme, OTHER_ROWS[20:], validation_file=valid, learning_rate=1e-5)
    assert job.published is not None
    assert (job.published["alias_moved"], job.published["code"]) == (False, "not_measured")
    assert "has learned every row" in job.published["reason"]
    assert await means(control, acme) == 1


async def test_few_rows_are_compared_by_what_each_came_to_on_rows_it_had_not_seen(
    control: Control, acme: Principal, script: JobScript
) -> None:
    """Both learn the same 20 rows: the one in use is not asked about rows that it has learned by now."""
    await train(control, acme, ROWS)
    script.loss = 0.4
    better = await train(control, acme, ROWS, learning_rate=1e-4)
    script.loss = 0.45
    worse = await train(control, acme, ROWS, learning_rate=1e-3)
    assert better.published is not None
    assert worse.published is not None
    assert (better.published["alias_moved"], worse.published["alias_moved"]) == (True, False)
    assert worse.published["replaced"]["comparison"]["rows"] == 20
    assert await means(control, acme) == 2


async def test_an_imported_version_is_scored_as_it_is_served(
    control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    await import_adapter(control, acme, "desk", seed=9)  # scored at 1 nat a token
    script.loss = 1.25
    worse = await train(control, acme)
    script.loss = 0.75
    better = await train(control, acme, seed=2)
    assert worse.published is not None
    assert better.published is not None
    assert worse.published["replaced"]["comparison"]["difference"] == pytest.approx(0.25)
    assert better.published["replaced"]["comparison"]["difference"] == pytest.approx(-0.25)
    assert (worse.published["alias_moved"], better.published["alias_moved"]) == (False, True)
    # Whoever is told that the name stays is told what speaks against the comparison, too.
    assert "not known which rows version 1 of desk" in worse.published["reason"]
    assert better.evaluation is not None
    assert any("not known which rows version 1 of desk" in note for note in better.evaluation["notes"])


async def test_always_and_never(control: Control, acme: Principal, umbrella: Principal, script: JobScript) -> None:
    hidden = await train(control, acme, publish="never", name="new")
    assert hidden.published is not None
    assert (hidden.published["alias_moved"], hidden.published["code"]) == (False, "never")
    with pytest.raises(NotFoundError):
        await control.adapters.get(acme, "new")
    assert [one.name for one in await control.adapters.list(acme)] == []
    assert [(one.version, one.active) for one in await control.adapters.versions(acme, "new")] == [(1, False)]
    for name in (str(hidden.fine_tuned_model), f"new@{hidden.published['digest'][:8]}"):
        assert (await control.inference.resolve(acme, name, None)).adapter is not None
        assert (await control.adapters.get(acme, name)).version == 1
        archive = await archive_of(control, acme, name)
        with zipfile.ZipFile(io.BytesIO(archive)) as packed:
            assert set(packed.namelist()) == {CONFIG_NAME, WEIGHTS_NAME, README_NAME}
        with pytest.raises(NotFoundError):
            await control.adapters.archive(umbrella, name)
    for name in "new", "new@12345678", "new@1", "ft:tiny:acme::nothing", "nobody@" + hidden.published["digest"]:
        with pytest.raises(NotFoundError):
            await control.adapters.archive(acme, name)
    assert (await control.adapters.rollback(acme, "new", 1)).active
    assert await means(control, acme, "new") == 1

    await train(control, acme)
    script.loss = 0.9
    kept = await train(control, acme, seed=2, publish="never")
    forced = await train(control, acme, seed=3, publish="always")
    assert await means(control, acme) == 3
    assert await warnings(control, acme, kept) == []  # as it was asked for
    assert any("publish is always; desk meant version 1" in line for line in await warnings(control, acme, forced))


async def test_what_means_nothing_can_be_deleted(control: Control, acme: Principal) -> None:
    await train(control, acme, publish="never", name="new")
    await control.adapters.delete(acme, "new")
    with pytest.raises(NotFoundError):
        await control.adapters.versions(acme, "new")
    assert control._blobs.store.list() == ()


async def test_a_first_version_that_is_worse_than_the_base_is_published_with_a_warning(
    control: Control, acme: Principal, script: JobScript
) -> None:
    script.loss = 3.5
    job = await train(control, acme)
    assert await means(control, acme) == 1
    (warning,) = await warnings(control, acme, job)
    assert "not better than the base" in warning
    assert job.evaluation is not None
    assert job.evaluation["verdicts"]["base"]["verdict"] == "worse"


async def test_min_gain_is_a_gate(control: Control, acme: Principal, script: JobScript) -> None:
    await train(control, acme)
    script.loss = 0.45
    little = await train(control, acme, seed=1, learning_rate=1e-4, min_gain=0.1)
    assert (little.settings["min_gain"], little.published and little.published["code"]) == (0.1, "below_min_gain")
    script.loss = 0.35
    enough = await train(control, acme, seed=1, learning_rate=1e-5, min_gain=0.1)
    assert enough.published is not None
    assert enough.published["alias_moved"]
    for fields in ({"publish": "always", "min_gain": 0.1}, {"publish": "never", "min_gain": 0.1}, {"min_gain": -1}):
        with pytest.raises(InvalidRequestError) as refused:
            await create_job(control, acme, **fields)
        assert refused.value.param == "min_gain"
    with pytest.raises(InvalidRequestError) as refused:
        await create_job(control, acme, publish="sometimes")
    assert refused.value.param == "publish"


async def test_preferences_are_judged_too(control: Control, acme: Principal, script: JobScript) -> None:
    first = await train(control, acme, PAIRS, method={"type": "dpo"})
    said = first.evaluation
    assert said is not None
    assert said["held_out"]["unit"] == "nats per pair"
    assert said["held_out"]["other_loss"] == pytest.approx(np.log(2))
    assert said["held_out"]["adapter_loss"] < np.log(2)
    verdicts = said["verdicts"]
    assert set(verdicts) == {"start", "base", "few_shot_base", "replaced"}
    assert verdicts["few_shot_base"]["verdict"] == "not measured"
    assert "Preferences are measured beside what training started from" in verdicts["few_shot_base"]["reason"]
    assert verdicts["start"] == verdicts["base"]
    script.loss = 0.1  # prefers the chosen answer by less
    second = await train(control, acme, PAIRS, method={"type": "dpo"}, learning_rate=1e-6)
    assert second.published is not None
    assert (second.published["alias_moved"], second.published["code"]) == (False, "not_better")
    assert second.published["replaced"]["comparison"]["unit"] == "nats per pair"


async def test_of_two_jobs_that_end_together_the_better_one_has_the_name(
    control: Control, acme: Principal, script: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are held against version 1 before either is written; the second to be written is judged once more."""
    await train(control, acme)
    both, looked, judge = asyncio.Barrier(2), set[str](), publication._judge

    async def together(context: Any, claim: Any, *rest: Any) -> Any:
        found = await judge(context, claim, *rest)
        if claim.job_id not in looked:
            looked.add(claim.job_id)
            await both.wait()
        return found

    monkeypatch.setattr(publication, "_judge", together)
    losses = {1e-4: 0.4, 1e-5: 0.3}
    held_out = script.held_out

    def by_rate(spec: Any) -> Any:
        script.loss = losses[spec.learning_rate]
        return held_out(spec)

    monkeypatch.setattr(script, "held_out", by_rate)
    file = (await upload(control, acme, MANY_ROWS)).id
    made = [
        await control.jobs.create(
            acme, JobRequest(model=BASE, training_file=file, name="desk", seed=1, learning_rate=rate)
        )
        for rate in losses
    ]
    worse, better = [await until(control, acme, job.id) for job in made]
    assert better.published is not None
    assert worse.published is not None
    assert better.published["alias_moved"]
    assert await means(control, acme) == better.published["version"]
    later = max((worse, better), key=lambda job: job.published["version"] if job.published else 0)
    assert later.published is not None
    assert later.published["replaced"]["version"] == (2 if later is better or better.published["version"] == 2 else 1)


async def test_a_transfer_is_held_against_the_base_as_well_as_its_start(
    control: Control, acme: Principal, script: JobScript
) -> None:
    await train(control, acme, name="start")
    script.loss = 2.5
    job = await train(control, acme, OTHER_ROWS, name="moved", lora={"init_from": "start"}, learning_rate=1e-5)
    assert job.evaluation is not None
    assert job.evaluation["held_out"]["other_loss"] == 3.0  # as the run says of its start
    assert job.evaluation["base"]["other_loss"] == pytest.approx(2.0)  # as the base is served
    verdicts = job.evaluation["verdicts"]
    assert (verdicts["start"]["verdict"], verdicts["base"]["verdict"]) == ("better", "worse")


def test_what_ancestors_have_learned_is_no_fair_row() -> None:
    def keys(*values: int) -> Any:
        return np.array(values, dtype=np.uint64)

    first = RowRecord.of(keys(1, 2), keys(3), np.array([[0.5]]), cross_validated=False, parent=None, has_parent=False)
    second = RowRecord.of(
        keys(4), keys(1, 5), np.array([[0.1], [0.7]]), cross_validated=False, parent=first, has_parent=True
    )
    assert second.has_learned(keys(1, 2, 3, 4, 5)).tolist() == [True, True, False, True, False]
    assert second.known_losses(1) == {5: [0.7]}
    assert RowRecord.decode(second.encode()) == second
    unknown = RowRecord.of(keys(4), keys(5), np.zeros((1, 1)), cross_validated=False, parent=None, has_parent=True)
    assert (first.whole, second.whole, unknown.whole) == (True, True, False)
