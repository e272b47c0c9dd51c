"""The client's types of settings are those of the service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import tenora_client as tc
from tenora.api.schemas.fine_tuning import JobCreateRequest, Lora, Method, Sweep, TrainingFile
from tenora.api.schemas.job_parts import CheckpointMetrics
from tenora.training.settings import BY_THEMSELVES, SETTINGS
from tenora_client.params import JobParams
from tests.client.fake import Script, job, reply
from tests.support.patience import PATIENCE


def test_the_types_are_fresh(repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "clients/python/scripts/settings.py"), "--check"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"run clients/python/scripts/settings.py {done.stderr}"


def test_every_setting_is_a_keyword_of_the_client() -> None:
    assert {*BY_THEMSELVES, *SETTINGS} <= set(JobParams.__annotations__)


def test_what_is_asked_of_a_job_may_be_typed_or_plain() -> None:
    typed = Script(reply(job()))
    with typed.client() as client:
        client.jobs.create(
            "file-1",
            model="m",
            lora=tc.LoraParams(rank=8, target_modules="all-linear", init_from="desk"),
            method=tc.MethodParams(type="dpo", dpo={"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}),
            sweep=tc.SweepParams(
                rank=[4, 8], learning_rate=tc.RangeParams(min=1e-4, max=1e-3), sampler="random", trials=3
            ),
            training_files=[tc.TrainingFileParams(file="file-2", weight=2)],
        )
    plain = Script(reply(job()))
    with plain.client() as client:
        client.jobs.create(
            "file-1",
            model="m",
            lora={"rank": 8, "target_modules": "all-linear", "init_from": "desk"},
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}},
            sweep={
                "rank": [4, 8],
                "learning_rate": {"min": 1e-4, "max": 1e-3},
                "sampler": "random",
                "trials": 3,
            },
            training_files=[{"file": "file-2", "weight": 2}],
        )
    assert typed.sent() == plain.sent()


@pytest.mark.full
def test_a_wrong_name_in_a_typed_part_is_found_by_a_type_checker(tmp_path: Path, repo_root: Path) -> None:
    right = (
        "import tenora_client as tc",
        "client = tc.Client()",
        "lora = tc.LoraParams(rank=8, target_modules='all-linear')",
        "sweep = tc.SweepParams(rank=[4, 8], learning_rate={'min': 1e-4, 'max': 1e-3})",
        "method = tc.MethodParams(type='dpo', dpo={'hyperparameters': {'beta': 0.2, 'n_epochs': 'auto'}})",
        "client.jobs.create('file-1', lora=lora, sweep=sweep, method=method, publish='never')",
        "client.jobs.create('file-1', lora={'rank': 8}, sweep={'rank': [4, 8]}, method={'type': 'dpo'})",
    )
    wrong = (
        "tc.LoraParams(rnak=8)",
        "tc.SweepParams(alpha=[1, 2])",
        "tc.MethodParams(type='supervised', supervised={'hyperparameters': {'beta': 1}})",
        "client.jobs.create('file-1', lora=lora, publish='perhaps')",
    )
    program = tmp_path / "program.py"
    program.write_text("\n".join((*right, *wrong)))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(program)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(repo_root / "clients/python/src")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == set(range(len(right) + 1, len(right) + len(wrong) + 1)), done.stdout


def test_the_parts_of_a_request_have_the_fields_of_the_api() -> None:
    parts = {
        Lora: tc.LoraParams,
        Method: tc.MethodParams,
        Sweep: tc.SweepParams,
        TrainingFile: tc.TrainingFileParams,
        JobCreateRequest: JobParams,
    }
    elsewhere = {"model", "training_file", "validation_file", "integrations"}  # arguments of their own, or refused
    for theirs, ours in parts.items():
        assert set(theirs.model_fields) - elsewhere == set(get_type_hints(ours)) - {"extra"}


def test_a_job_has_its_settings_typed() -> None:
    with Script(reply(job(max_seq_length=128, truncate=True, learning_rate=5e-4, publish="never"))).client() as client:
        found = client.jobs.get("ftjob-1")
    assert (found.max_seq_length, found.truncate, found.learning_rate, found.publish) == (128, True, 5e-4, "never")
    assert found.min_gain is None
    assert set(SETTINGS) <= set(tc.JobState.model_fields)


def test_the_metrics_of_a_checkpoint_are_typed_as_the_api_says_them() -> None:
    assert set(CheckpointMetrics.model_fields) == set(tc.CheckpointMetrics.model_fields)
    found = tc.CheckpointMetrics.model_validate({"step": 4, "valid_loss": 1.5})
    assert (found.step, found.valid_loss, found.train_loss) == (4, 1.5, None)
