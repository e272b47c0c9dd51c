"""Every field of a run's spec changes what the run does, whatever kind of run it is: none is ignored.

`tests/control/jobs/test_job_fields.py` shows how the fields of a request become these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.training.events import EvalEvent, FailedEvent, FinishedEvent, FoldEvent, StepEvent, TrainEvent
from tenora.training.fusion import FusedTraining
from tenora.training.pass_queue import Work
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec, Trial
from tests.data.rows import random_rows
from tests.support.full import full_but

from .runs import MakeSpec, TrainingRun, comparable, events_of

KINDS = ("plain", "folds", "sweep", "dpo")
CHANGES: Mapping[str, Any] = {
    "method_settings": {"beta": 0.7},
    "lora": LoraSpec(rank=3, alpha=8.0),
    "n_epochs": 3,
    "max_steps": 3,
    "batch_size": 6,
    "learning_rate": 1e-3,
    "scheduler": "constant",
    "warmup_ratio": 0.7,
    "weight_decay": 10.0,
    "max_grad_norm": 1e-3,
    "eval_interval": 2,
    "early_stopping": 1,
    "seed": 12,
    "general_text": (5, 9, 30, 11),
}
OTHERWISE = {
    **dict.fromkeys(("run_id", "share_group", "weight", "workdir", "base_model"), "names, and shares of the machine"),
    **dict.fromkeys(("packing", "tokens_per_microbatch", "recompute_activations"), "the same result by other passes"),
    "acknowledged": "what is told again; tests of its own",
    "split_seed": "which rows are in which fold; tests of its own",
    **dict.fromkeys(("tasks", "method", "init_path", "folds", "trials"), "what makes a kind; tests of their own"),
}
USELESS = {
    ("plain", "method_settings"),
    ("folds", "method_settings"),
    ("sweep", "method_settings"),
}  # which no request can ask for
OF_TRIALS = {"n_epochs", "batch_size", "learning_rate"}  # each trial has its own


@pytest.fixture
def spec(request: pytest.FixtureRequest, make_spec: MakeSpec, tmp_path: Path) -> TrainSpec:
    """12 rows, a few of them again and again, so that there is something to learn; of DPO 6 pairs of them."""
    rows = random_rows(4, seed=3).select(np.array([0, 1, 2, 3] * 3))
    pairs = request.param == "dpo"
    rows = TokenizedDataset(rows.tokens, rows.weights, rows.offsets, rows.lines, rows_per_example=2 if pairs else 1)
    rows.save(tmp_path / "rows.npz")
    rows.select(np.arange(4)).save(tmp_path / "measured.npz")
    held_out = "" if request.param == "folds" else str(tmp_path / "measured.npz")
    fields: dict[str, Any] = {"lora": LoraSpec(rank=4, alpha=8.0), "learning_rate": 1e-2, "n_epochs": 4}
    fields["tasks"] = (TaskSpec(name="rows", train_path=str(tmp_path / "rows.npz"), valid_path=held_out),)
    fields["batch_size"] = 2 if pairs else 4
    if request.param == "folds":
        fields["folds"] = 3
    if request.param == "sweep":
        shape = {"alpha": 8.0, "n_epochs": 4, "batch_size": 4}
        fields["trials"] = tuple({"rank": rank, "learning_rate": 1e-2, **shape} for rank in (2, 4))
    if pairs:
        fields["method"] = "dpo"
    return make_spec(**fields)


def told(decoder: Decoder, spec: TrainSpec) -> list[TrainEvent]:
    events = events_of(TrainingRun(decoder, spec))
    assert not isinstance(events[-1], FailedEvent), events[-1]
    return comparable(events)


def test_every_field_is_here() -> None:
    assert {*CHANGES, *OTHERWISE} == set(TrainSpec.__struct_fields__)


def faster(trial: Trial) -> Trial:
    return trial | {"learning_rate": 0.3, "n_epochs": 6}


@pytest.mark.parametrize("spec", full_but(KINDS[0], KINDS), indirect=True)
def test_each_field_changes_the_run(
    decoder: Decoder, spec: TrainSpec, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["spec"]
    usual = told(decoder, spec)
    # Steps so long that some of them are for the worse.
    restless: dict[str, Any] = {"eval_interval": 1, "learning_rate": 0.3, "n_epochs": 6}
    if kind == "sweep":
        restless = {"eval_interval": 1, "trials": tuple(faster(trial) for trial in spec.trials)}
    ignored = []
    for name, value in CHANGES.items():
        changes = {name: value}
        if kind == "sweep" and name in OF_TRIALS:
            changes = {"trials": tuple(trial | changes for trial in spec.trials)}
        if kind == "sweep" and name == "lora":
            changes = {"lora": msgspec.structs.replace(spec.lora, dropout=0.3)}  # its rank and alpha are the trials'
        if name == "early_stopping":
            changes |= restless
        other = msgspec.structs.replace(spec, workdir=str(tmp_path / name), **changes)
        against = usual
        if name == "early_stopping":
            patient = msgspec.structs.replace(spec, workdir=str(tmp_path / "patient"), **restless)
            against = told(decoder, patient)
        if told(decoder, other) == against:
            ignored.append(name)
    assert ignored == [name for of, name in USELESS if of == kind]


@pytest.mark.parametrize("spec", KINDS, indirect=True)
def test_passes_are_smaller_without_packing(
    decoder: Decoder, spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    run = FusedTraining._run

    def look(self: FusedTraining, works: list[Work]) -> Any:
        rows.extend(len(part.rows) for work in works if work.objective is not None for part in work.parts)
        return run(self, works)

    monkeypatch.setattr(FusedTraining, "_run", look)
    loose = msgspec.structs.replace(spec, packing=False, workdir=str(tmp_path / "loose"))
    told(decoder, msgspec.structs.replace(spec, tokens_per_microbatch=400))
    together = max(rows)
    rows.clear()
    told(decoder, loose)
    assert max(rows) == (2 if spec.method == "dpo" else 1) < together


class TestFewShot:
    """The folds follow what is asked of the fit on all rows."""

    @pytest.mark.parametrize("spec", ["folds"], indirect=True)
    def test_max_steps_is_the_most_that_anything_makes(self, decoder: Decoder, spec: TrainSpec) -> None:
        events = told(decoder, msgspec.structs.replace(spec, max_steps=3))
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        assert finished.steps == 3
        assert [event.step for event in events if isinstance(event, StepEvent)] == [1, 2, 3]
        assert {event.total_steps for event in events if isinstance(event, StepEvent)} == {3}
        folds = [event for event in events if isinstance(event, FoldEvent)]
        assert {(event.step, event.total_steps) for event in folds} == {(3, 3)}
        assert [event.step for event in events if isinstance(event, EvalEvent)] == [0, 3]

    @pytest.mark.parametrize("spec", ["folds"], indirect=True)
    @pytest.mark.parametrize(
        ("fields", "steps", "of_folds"),
        [
            ({}, [0, 3, 6, 9, 12], [2, 4, 6, 8]),  # an epoch has 3 steps over all rows, 2 of a fold's
            ({"eval_interval": 5}, [0, 5, 10, 12], [3, 7, 8]),
            ({"max_steps": 7}, [0, 3, 6, 7], [3, 6, 7]),
            ({"max_steps": 4, "eval_interval": 1}, [0, 1, 2, 3, 4], [1, 2, 3, 4]),
        ],
    )
    def test_the_folds_are_measured_where_the_fit_on_all_rows_may_end(
        self, decoder: Decoder, spec: TrainSpec, fields: dict[str, Any], steps: list[int], of_folds: list[int]
    ) -> None:
        random_rows(12, seed=3).save(Path(spec.tasks[0].train_path))  # equal rows would share a fold
        events = told(decoder, msgspec.structs.replace(spec, **fields))
        assert [event.step for event in events if isinstance(event, EvalEvent)] == steps
        for fold in range(3):
            assert [e.step for e in events if isinstance(e, FoldEvent) and e.fold == fold] == of_folds
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        assert finished.steps in steps[1:]

    @pytest.mark.parametrize("spec", ["folds"], indirect=True)
    def test_early_stopping_ends_the_folds_together(self, decoder: Decoder, spec: TrainSpec, tmp_path: Path) -> None:
        wild = msgspec.structs.replace(spec, learning_rate=8e-2, eval_interval=1, n_epochs=6)
        whole = [event for event in told(decoder, wild) if isinstance(event, EvalEvent)]
        losses = [event.valid_loss for event in whole[1:]]
        stale, expected = 0, len(losses)
        for number in range(1, len(losses)):
            stale = 0 if losses[number] < min(losses[:number]) else stale + 1
            if stale == 2:
                expected = number + 1
                break
        assert expected < len(losses), "the loss rises again"
        patient = msgspec.structs.replace(wild, early_stopping=2, workdir=str(tmp_path / "patient"))
        events = told(decoder, patient)
        assert [event for event in events if isinstance(event, EvalEvent)] == whole[: expected + 1]
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        assert finished.stopped_early
        assert finished.steps == min(whole[1 : expected + 1], key=lambda event: event.valid_loss).step
