"""A method that only this file knows: registered, asked for, prepared, trained and judged; nothing else is changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tenora.training.methods.method import Method
from tenora.training.methods.table import METHODS, register
from tests.support.patience import PATIENCE

PROGRAM = Path(__file__).with_name("new_method.py")


def test_a_new_method_is_one_file(tiny_base: Path, tmp_path: Path, repo_root: Path) -> None:
    """In a process of its own: schemas are made from the methods that there are when they are imported."""
    command = [sys.executable, "-m", "tests.training.new_method", str(tiny_base), str(tmp_path)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["refused"] == [
        "method.label_smoothing.hyperparameters.epsilon",
        "method.supervised.hyperparameters.epsilon",
    ]
    assert "epsilon" in told["schema"]
    assert told["asked"] == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto", "epsilon": 0.25}
    assert told["shown"]["epsilon"] == told["lineage"]["epsilon"] == 0.25
    assert told["learning_rate"] == 1e-3
    assert [event for event in told["events"] if event != "step"] == [
        "eval",
        "eval",
        "checkpoint",
        "eval",
        "checkpoint",
        "finished",
    ]
    assert told["metrics"] == {"smoothed": 0.25}
    assert told["resumed"] == told["digest"]
    assert told["unit"] == "nats per answer"
    assert told["units"][:2] == ["nats per token", "nats per pair"]
    assert told["units"][-1] == "nats per answer"
    assert re.search(r" on \d+ answers, a difference of .* nats per answer: ", told["comparison"])
    assert "smoothed" in told["event"]
    first, *steps = [line.split(",") for line in told["table"]]
    assert first[-2:] == ["train_smoothed", "valid_smoothed"]
    assert {step[-2] for step in steps} == {"", "0.25"}, "of step 0 nothing is learned"
    assert {step[-1] for step in steps} == {""}
    assert told["card_loss"] == pytest.approx(0.75 * told["plain_loss"], rel=1e-5)


def test_a_name_is_taken_once() -> None:
    for method in METHODS.values():
        with pytest.raises(ValueError, match="already"):
            register(method)


def test_a_setting_of_a_method_has_a_name_of_its_own() -> None:
    class Clashing(Method):
        name = "clashing"
        summary = "clashes"
        learning_rate = 1.0
        settings = (METHODS["supervised"].hyperparameters["n_epochs"],)
        learning = METHODS["supervised"].learning

    with pytest.raises(ValueError, match="name of one that all methods have"):
        register(Clashing())  # type: ignore[abstract]
    assert "clashing" not in METHODS


def test_a_setting_that_says_that_it_can_be_swept_is_swept(tiny_base: Path, tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "-m", "tests.training.new_swept_setting", str(tiny_base), str(tmp_path)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["refused"] == "sweep.warmup_ratio must be a number, at least 0 and at most 1."
    assert told["trials"] == told["lineage"] == [0.0, 0.9]
    assert "warmup_ratio" not in told["shown"], "the sweep has yet to choose it"
    assert told["fields"][-1] == "warmup_ratio"
    assert told["csv"].startswith("trial,rank,alpha,learning_rate,n_epochs,batch_size,warmup_ratio,status,")
    assert told["losses"]["0"] != told["losses"]["1"], "each trial trains with its own"
    assert told["finished"]
