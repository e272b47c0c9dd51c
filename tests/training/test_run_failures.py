"""A run that cannot go on says why, and harms nobody."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tenora.data.dataset import TokenizedDataset
from tenora.data.rows import ANSWERS
from tenora.model.decoder import Decoder
from tenora.training import learner
from tenora.training.corpus import Corpus
from tenora.training.events import FinishedEvent, StepEvent
from tenora.training.spec import LoraSpec, TaskSpec
from tests.data.rows import random_rows
from tests.support.errors import OUT_OF_MEMORY

from .runs import (
    Items,
    MakeSpec,
    TrainingRun,
    assert_same_bits,
    events_of,
    failure,
    weights_of,
)


def test_a_loss_that_is_not_finite_names_the_step_and_the_lines(
    decoder: Decoder, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(n_epochs=1)
    poison, embed = 250, decoder.embed
    rows, valid = random_rows(14, seed=1), random_rows(5, seed=2)
    for dataset in (rows, valid):
        dataset.tokens[dataset.tokens == poison] = 5
    rows.row(6)[0][0] = poison
    replace(rows, lines=rows.lines * 10).save(tmp_path / "train.npz")
    valid.save(tmp_path / "valid.npz")
    monkeypatch.setattr(decoder, "embed", lambda ids: embed(ids).masked_fill((ids == poison)[:, None], torch.nan))
    failed = failure(TrainingRun(decoder, spec))
    assert failed.code == "non_finite"
    assert re.search(r"loss of step \d+ is not a finite number, in a batch with line 70 of", failed.message)


def test_a_gradient_that_is_not_finite_names_the_lines_of_its_step(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "clip_grad_norm", lambda grad, max_norm: float("inf"))
    spec = make_spec()
    failed = failure(TrainingRun(decoder, spec))
    assert (failed.code, "gradient of step 1" in failed.message) == ("non_finite", True)
    rows = Corpus.load(spec.tasks, kind=ANSWERS).batch(0, 4, seed=11)
    assert ", ".join(str(row + 1) for row in sorted(rows)) in failed.message


def test_a_loss_of_exactly_zero_stops_and_explains(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    certain = copy.deepcopy(decoder)
    monkeypatch.setattr(
        certain,
        "logits",
        lambda hidden: (hidden @ certain.lm_head.values.t()).mul(0.0).index_fill(1, torch.tensor([9]), 1e4),
    )
    spec = make_spec()
    for path in (spec.tasks[0].train_path, spec.tasks[0].valid_path):
        rows = TokenizedDataset.load(Path(path))
        replace(rows, tokens=np.full_like(rows.tokens, 9)).save(Path(path))
    assert failure(TrainingRun(certain, spec)).code == "zero_loss"


def test_rows_without_a_learned_token_are_an_error_that_explains(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec()
    rows = TokenizedDataset.load(Path(spec.tasks[0].train_path))
    replace(rows, weights=np.zeros_like(rows.weights)).save(Path(spec.tasks[0].train_path))
    failed = failure(TrainingRun(decoder, spec))
    assert (failed.code, "14 rows" in failed.message) == ("no_trainable_tokens", True)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((error, "out_of_memory") for error in OUT_OF_MEMORY),
        (OSError(28, "No space left on device"), "storage_full"),
        (PermissionError(13, "Permission denied"), "storage_error"),
        (ZeroDivisionError("surprise"), "internal_error"),
    ],
)
def test_no_error_of_a_run_reaches_the_engine(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(learner, "save_state", fail)
    assert failure(TrainingRun(decoder, make_spec())).code == code


def test_a_full_disk_keeps_the_last_good_state(
    decoder: Decoder, make_spec: MakeSpec, whole: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()

    def torn(path: Path, tensors: Any, metadata: Any) -> None:
        path.write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    run = TrainingRun(decoder, spec)
    events = []
    for item in run:
        events.append(item)
        if isinstance(item, StepEvent) and item.step == 4:
            monkeypatch.setattr("tenora.training.checkpoint.write_file", torn)
    assert (events[-1].run_id, events[-1].code) == ("run-1", "storage_full")
    assert sorted(path.name for path in Path(spec.workdir).iterdir()) == ["checkpoints", "resume.safetensors"]
    monkeypatch.undo()
    assert_same_bits(weights_of(events_of(TrainingRun(decoder, spec))[-1]), weights_of(events_of(whole)[-1]))


def test_a_state_of_another_run_or_a_torn_one_is_refused(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec()
    events_of(TrainingRun(decoder, spec))
    assert failure(TrainingRun(decoder, msgspec.structs.replace(spec, learning_rate=1e-3))).code == "resume_mismatch"
    state = Path(spec.workdir) / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    assert failure(TrainingRun(decoder, spec)).code == "resume_unreadable"


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": (TaskSpec(name="rows", train_path="/nonexistent.npz", valid_path="/nonexistent.npz"),)},
        {"tasks": ()},
        {"lora": LoraSpec(target_modules=("w1",))},
        {"n_epochs": 0},
        {"method": "dpo"},
        {"init_path": "/nonexistent"},
    ],
)
def test_what_cannot_start_fails_as_an_event(decoder: Decoder, make_spec: MakeSpec, changes: dict[str, Any]) -> None:
    assert failure(TrainingRun(decoder, make_spec(**changes))).message


def test_max_steps_goes_beyond_the_epochs_and_short_of_them(decoder: Decoder, make_spec: MakeSpec) -> None:
    for steps in (2, 10):
        events = events_of(TrainingRun(decoder, make_spec(max_steps=steps)))
        assert [event.step for event in events if isinstance(event, StepEvent)] == list(range(1, steps + 1))
        assert isinstance(events[-1], FinishedEvent)
