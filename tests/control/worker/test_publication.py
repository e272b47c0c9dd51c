"""What a finished job says of its adapter, and what may go wrong between the last step and the name that is called."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tenora.control.adapters.model_card import README_NAME
from tenora.control.control import Control
from tenora.control.gate import baselines
from tenora.control.inference import scoring
from tenora.control.jobs.records import JobRecord
from tenora.control.jobs.rows import find_job
from tenora.control.tenancy.records import Principal
from tenora.data.dataset import TokenizedDataset
from tenora.engine.messages import Generate, SamplingParams
from tenora.errors import NotFoundError, UnavailableError
from tenora.training.events import FinishedEvent, HeldOut, Probe, TrainEvent
from tenora.training.spec import TrainSpec
from tests.control.conftest import (
    ROWS,
    ImportAdapter,
    OpenControl,
    archive_of,
    create_job,
    messages,
    tenant,
    until,
    upload,
)
from tests.support import scripted_jobs
from tests.support.patience import PATIENCE
from tests.support.scripted_answers import refusal, scores
from tests.support.scripted_engine import Answer
from tests.support.scripted_jobs import JobScript

ADAPTER, BASE_SCORE = -1.0, -2.0  # log-probability of every token, as the scripted engine has it


@pytest.fixture(autouse=True)
def _asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine says when it is to be asked again: it is after the usual pause, which is cut short here."""
    monkeypatch.setitem(UnavailableError.__init__.__kwdefaults__, "retry_after", 0.01)


@pytest.fixture
def measured(script: JobScript) -> JobScript:
    """Runs say of their held-out rows what the scripted serving path says, too."""

    def with_rows(spec: TrainSpec) -> list[TrainEvent]:
        *before, last = script.events(spec)
        if not isinstance(last, FinishedEvent):
            return [*before, last]
        path = spec.tasks[0].valid_path
        rows = TokenizedDataset.load(Path(path))
        tokens = [int(rows.row(index)[1].sum()) for index in range(len(rows))]
        held_out = HeldOut(
            tokens=tokens, adapter=[-ADAPTER * count for count in tokens], start=[3.0 * count for count in tokens]
        )
        probe = Probe(path=path, rows=[[ADAPTER] * count for count in tokens[:4]])
        told = {"last_loss": 1.7, "general_loss": 1.0, "base_general_loss": 2.0}
        return [*before, msgspec.structs.replace(last, held_out=held_out, probe=probe, **told)]

    script.training = with_rows
    return script


async def train(control: Control, who: Principal, **fields: Any) -> JobRecord:
    valid = await upload(control, who, ROWS[:8])
    job = await create_job(control, who, validation_file=valid.id, **{"name": "desk", "seed": 5, **fields})
    return await until(control, who, job.id)


async def test_the_card_rides_on_job_and_adapter(
    control: Control, acme: Principal, measured: JobScript, tiny_base: Path
) -> None:
    done = await train(control, acme)
    assert done.status == "succeeded", done.error
    said = done.evaluation
    assert said is not None
    assert (said["valid_loss"], said["source"], said["notes"]) == (1.5, "held-out rows", [])
    assert said["held_out"] | {"low": 0, "high": 0} == {
        "rows": 8,
        "tokens": said["held_out"]["tokens"],
        "adapter_loss": 1.0,
        "other_loss": 3.0,
        "difference": -2.0,
        "low": 0,
        "high": 0,
        "verdict": "better",
        "unit": "nats per token",
    }
    few_shot = said["few_shot"]
    assert (few_shot["shots"], few_shot["base_loss"]) == (3, 3.0)
    assert (few_shot["comparison"]["adapter_loss"], few_shot["comparison"]["other_loss"]) == (1.0, 2.0)
    assert said["forgetting"] | {"tokens": 0} == {"tokens": 0, "adapter_loss": 1.0, "base_loss": 2.0, "change": -1.0}
    assert said["overfitting"]["verdict"] == "strong"
    assert said["near_duplicates"] == 8
    assert said["parity"] | {"tokens": 0} == {
        "rows": 4,
        "tokens": 0,
        "gap": 0.0,
        "effect": 1.0,
        "tolerance": 2e-3,
        "dtype": "float32",
        "modules": 21,
    }
    (task,) = said["tasks"]
    assert task | {"comparison": None} == {
        "name": "rows",
        "file": done.training_file,
        "weight": 1.0,
        "trained": 20,
        "held_out": 8,
        "cut": 0,
        "comparison": None,
    }
    assert task["comparison"] == said["held_out"] == said["base"]
    lineage = said["lineage"]
    weights = hashlib.sha256((tiny_base / "model.safetensors").read_bytes()).hexdigest()
    assert lineage["base"] == {
        "name": "tiny",
        "kind": "directory",
        "source": tiny_base.name,
        "member": None,
        "revision": None,
        "weights": {"model.safetensors": weights},
    }
    assert lineage["rows"] == {
        "trained": 20,
        "held_out": 8,
        "cut": 0,
        "max_seq_length": 256,
        "truncate": False,
        "split_seed": None,
    }
    assert (lineage["settings"]["max_seq_length"], lineage["settings"]["truncate"]) == (256, False)
    assert (lineage["job_id"], lineage["base_model"], lineage["seed"], lineage["parent"]) == (done.id, "tiny", 5, None)
    files = [await control.files.get(acme, one) for one in (done.training_file, done.validation_file) if one]
    assert [(one["id"], one["sha256"]) for one in lineage["files"]] == [(file.id, file.sha256) for file in files]
    assert [one["purpose"] for one in lineage["files"]] == ["training", "validation"]
    assert lineage["versions"]["torch"] == torch.__version__
    assert lineage["settings"]["learning_rate"] == measured.specs[0].learning_rate
    (version,) = await control.adapters.versions(acme, "desk")
    assert version.evaluation == said


async def test_the_base_is_measured_while_the_job_runs_and_once(open_control: OpenControl, measured: JobScript) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    measured.hold_at = 2
    valid = await upload(control, acme, ROWS[:8])
    job = await create_job(control, acme, validation_file=valid.id, name="desk")
    await measured.until_held()
    async with asyncio.timeout(PATIENCE):
        while True:
            async with control._registry.database.read() as session:
                row = await find_job(session, acme.tenant_id, job.id)
            if (row.baselines or {}).get("complete"):
                break
            await asyncio.sleep(0.01)
    before = len(measured.scored)
    assert before == 6 + 8  # the probe rows that PROBE_TOKENS hold, the rows behind their shots
    assert {request.adapter for request in measured.scored} == {None}
    assert acme.tenant_id not in {request.share_group for request in measured.scored}
    await control.close()

    measured.hold_at = None
    control = await open_control()
    done = await until(control, acme, job.id)
    assert done.evaluation is not None
    assert done.evaluation["few_shot"]["comparison"]["rows"] == 8
    since = measured.scored[before:]
    assert len(since) == 4  # the adapter's own; nothing of the base again
    assert all(request.adapter is not None for request in since)
    assert {(request.share_group, request.priority) for request in since} == {(acme.tenant_id, -1)}


async def test_requests_come_before_the_few_shot_rows(
    control: Control, acme: Principal, measured: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_PATIENCE_SECONDS", 0.05)
    waiting = control.engine.generate(Generate(request_id="r", token_ids=[1], sampling=SamplingParams(max_tokens=1)))
    answer = asyncio.create_task(anext(waiting))
    await measured.until(lambda: bool(measured.generated))
    done = await train(control, acme)
    answer.cancel()
    assert done.status == "succeeded"
    assert done.evaluation is not None
    assert done.evaluation["few_shot"] is None
    assert done.evaluation["forgetting"] is not None
    assert done.evaluation["notes"] == ["The run was over before the base was measured on all rows that were meant."]


async def test_another_job_that_is_prepared_holds_up_no_few_shot_rows(
    control: Control, acme: Principal, measured: JobScript
) -> None:
    may_end = threading.Event()
    preparing: list[asyncio.Task[bool]] = []

    def prepares_meanwhile(request: Generate) -> Answer:
        if not preparing:
            other = control.inference.tokenizing.job(acme.tenant_id, lambda _: may_end.wait())
            preparing.append(asyncio.ensure_future(other))
        return scores(request)

    measured.score = prepares_meanwhile
    done = await train(control, acme, n_epochs=50)
    may_end.set()
    await asyncio.gather(*preparing)
    assert done.evaluation is not None
    assert done.evaluation["few_shot"]["comparison"]["rows"] == 8


@pytest.mark.parametrize("of_the_engine", [True, False], ids=["refused", "defect"])
async def test_without_the_bases_figures_the_job_still_succeeds(
    control: Control, acme: Principal, measured: JobScript, monkeypatch: pytest.MonkeyPatch, of_the_engine: bool
) -> None:
    def only_adapters(request: Generate) -> Answer:
        return scores(request) if request.adapter is not None else refusal(request, "invalid_request", "No.")

    def defect(*_: Any) -> Any:
        raise ZeroDivisionError

    if of_the_engine:
        measured.score = only_adapters
    else:
        monkeypatch.setattr(baselines, "probe_rows", defect)
    done = await train(control, acme)
    assert done.status == "succeeded", done.error
    assert done.evaluation is not None
    assert done.evaluation["few_shot"] is None
    assert (done.evaluation["parity"]["gap"], done.evaluation["parity"]["effect"]) == (0.0, None)
    assert done.evaluation["held_out"]["verdict"] == "better"


async def test_a_busy_engine_is_asked_again(control: Control, acme: Principal, measured: JobScript) -> None:
    refused = 0

    def busy(request: Generate) -> Answer:
        nonlocal refused
        if request.adapter is not None and refused < 3:
            refused += 1
            return refusal(request, "adapter_unavailable", "Every slot is in use.")
        return scores(request)

    measured.score = busy
    assert (await train(control, acme)).status == "succeeded"
    assert refused == 3


async def test_an_adapter_that_cannot_be_tried_out_is_not_published(
    control: Control, acme: Principal, measured: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(request: Generate) -> Answer:
        if request.adapter is not None:
            return refusal(request, "adapter_unavailable", "Every adapter slot is pinned.")
        return scores(request)

    monkeypatch.setattr(scoring, "PATIENCE_SECONDS", 0.05)
    measured.score = full
    failed = await train(control, acme)
    assert failed.error is not None
    assert failed.error["code"] == "parity_unavailable"
    assert "pinned" in failed.error["message"]
    with pytest.raises(NotFoundError):
        await control.adapters.get(acme, "desk")


async def test_an_engine_that_dies_in_the_examination_is_waited_for(
    control: Control, acme: Principal, measured: JobScript
) -> None:
    died = False

    def dies(request: Generate) -> Answer:
        nonlocal died
        if request.adapter is not None and not died:
            died = True
            raise RuntimeError
        return scores(request)

    measured.score = dies
    done = await train(control, acme)
    assert done.status == "succeeded", done.error
    assert len(measured.specs) == 2
    assert any("(attempt 1 of 5)" in line for line in await messages(control, acme, done.id))


async def test_a_gap_fails_the_job(control: Control, acme: Principal, measured: JobScript) -> None:
    measured.score = lambda request: scores(request, -1.0025)
    failed = await train(control, acme)
    assert failed.error is not None
    assert failed.error["code"] == "parity_failed"
    assert failed.evaluation is None


async def test_untrained_modules_fail_the_job(
    control: Control, acme: Principal, measured: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scripted_jobs.random_modules

    def hole(*args: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        modules = made(*args)
        next(iter(modules.values()))[1][:] = 0.0
        return modules

    monkeypatch.setattr(scripted_jobs, "random_modules", hole)
    failed = await train(control, acme)
    assert failed.error is not None
    assert failed.error["code"] == "untrained_modules"
    assert "model.layers.0.self_attn.q_proj (zero)" in failed.error["message"]
    assert control._blobs.store.list() == ()


async def examined(control: Control, who: Principal, script: JobScript) -> JobRecord:
    """A job whose adapter is being examined, for as long as the engine does not score again."""
    asked = asyncio.Event()

    def ask(request: Generate) -> Answer:
        if request.adapter is not None:
            asked.set()
            return refusal(request, "adapter_unavailable", "Busy.")
        return scores(request)

    script.score = ask
    valid = await upload(control, who, ROWS[:8])
    job = await create_job(control, who, validation_file=valid.id, name="desk")
    await asked.wait()
    return job


async def test_cancelling_during_the_examination_wins(control: Control, acme: Principal, measured: JobScript) -> None:
    job = await examined(control, acme, measured)
    await control.jobs.cancel(acme, job.id)
    measured.score = scores
    assert (await until(control, acme, job.id)).status == "cancelled"
    with pytest.raises(NotFoundError):
        await control.adapters.get(acme, "desk")


async def test_others_publish_while_one_is_examined(
    control: Control, acme: Principal, measured: JobScript, import_adapter: ImportAdapter
) -> None:
    job = await examined(control, acme, measured)
    async with asyncio.timeout(PATIENCE):
        await import_adapter(control, acme, "other", seed=9)
        await control.adapters.delete(acme, "other")
    measured.score = scores
    assert (await until(control, acme, job.id)).status == "succeeded"


async def unpack(control: Control, who: Principal, name: str, directory: Path) -> str:
    """Download into `directory`; the card."""
    archive = await archive_of(control, who, name)
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        file.extractall(directory)
    return (directory / README_NAME).read_text("utf-8")


async def test_the_card_of_one_tenant_is_not_anothers(
    control: Control, acme: Principal, umbrella: Principal, measured: JobScript, tmp_path: Path
) -> None:
    """Who uploads the same weights shares the stored files, and learns nothing of where they come from."""
    done = await train(control, acme)
    ours = await unpack(control, acme, "desk", tmp_path / "ours")
    assert done.id in ours
    config = (tmp_path / "ours" / "adapter_config.json").read_bytes()
    theirs = await control.adapters.import_(
        umbrella, name="copy", config=config, weights=tmp_path / "ours" / "adapter_model.safetensors"
    )
    assert theirs.digest == (await control.adapters.get(acme, "desk")).digest
    card = await unpack(control, umbrella, "copy", tmp_path / "theirs")
    for secret in (done.id, done.training_file, "acme", "Held-out", "Lineage"):
        assert secret not in card
    assert await unpack(control, acme, "desk", tmp_path / "again") == ours
