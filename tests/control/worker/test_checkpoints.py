"""Checkpoints of a run that goes on while the worker keeps them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenora.control.adapters import blobs
from tenora.control.control import Control
from tenora.control.tenancy.records import Principal
from tenora.training.events import CheckpointEvent
from tests.control.conftest import create_job, until
from tests.support.scripted_jobs import JobScript

Meanwhile = Callable[[Path], None]


def goes_for_good(directory: Path) -> None:
    shutil.rmtree(directory)


def is_written_once_more(directory: Path) -> None:
    """The engine died after it had told of the checkpoint, and its successor is at that step now."""
    directory.rename(directory.with_name("old"))
    shutil.copytree(directory.with_name("old"), directory)


@pytest.mark.parametrize(("meanwhile", "kept"), [(goes_for_good, 0), (is_written_once_more, 1)])
async def test_a_checkpoint_that_its_run_takes_away_while_it_is_read_ends_no_job(
    meanwhile: Meanwhile,
    kept: int,
    control: Control,
    acme: Principal,
    script: JobScript,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, validate = script.events, blobs.validate_files
    early: list[Path] = []

    def with_an_early_one(spec: Any) -> list[Any]:
        events: list[Any] = []
        for event in told(spec):
            if isinstance(event, CheckpointEvent):
                early.append(Path(event.path).with_name("step-000001"))
                shutil.copytree(event.path, early[0])
                events.append(msgspec.structs.replace(event, step=1, path=str(early[0])))
            else:
                events.append(event)
        return events

    def validated(config: Any, weights: Path, *given: Any, **settings: Any) -> Any:
        if weights.parent in early:
            early.clear()
            meanwhile(weights.parent)
            weights = weights.with_name("gone")
        return validate(config, weights, *given, **settings)

    monkeypatch.setattr(script, "training", with_an_early_one)
    monkeypatch.setattr(blobs, "validate_files", validated)
    job = await until(control, acme, (await create_job(control, acme)).id)
    assert job.status == "succeeded"
    assert not early, "it was taken away"
    assert len((await control.jobs.checkpoints(acme, job.id)).items) == kept
