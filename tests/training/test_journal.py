"""What a run has said and nobody has acknowledged is in its saved state, and said again when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.training import journal, learner
from tenora.training.events import (
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    Recorded,
    RetoldEvent,
    StepEvent,
    StoppedEvent,
    TrainEvent,
    TrialEvent,
)
from tenora.training.fusion import FusedTraining
from tenora.training.journal import Journal
from tenora.training.plans import sweep
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec

from .runs import Items, MakeSpec, TrainingRun, assert_same_bits, comparable, events_of, weights_of


@pytest.fixture(autouse=True)
def _saves_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "STATE_INTERVAL_SECONDS", 0.0)


def followed(decoder: Decoder, spec: TrainSpec, until: int, acknowledged: int) -> list[TrainEvent]:
    """The first events of a run whose process is then killed, and of which so many were acknowledged."""
    training, events = FusedTraining(decoder), []
    training.start(spec)
    for item in training:
        if item is not None:
            events.append(item)
            training.acknowledge(spec.run_id, min(len(events), acknowledged))
            if len(events) == until:
                break
    for _ in range(3):  # on its way to the next one, so that the state is saved
        events += events_of([training.advance()])
    return events


def resumed(decoder: Decoder, spec: TrainSpec) -> tuple[list[Recorded], list[TrainEvent]]:
    """What a resumed run says again, and what it says then."""
    first, *rest = events_of(TrainingRun(decoder, spec))
    if isinstance(first, RetoldEvent):
        return first.events, rest
    return [], [first, *rest]


@pytest.mark.parametrize(("until", "acknowledged"), [(2, 0), (4, 1), (8, 3), (8, 8), (11, 2)])
def test_a_follower_that_dies_misses_nothing(
    decoder: Decoder, make_spec: MakeSpec, whole: Items, until: int, acknowledged: int
) -> None:
    spec = make_spec(acknowledged=True)
    told = followed(decoder, spec, until, acknowledged)
    again, rest = resumed(decoder, spec)
    assert again == told[acknowledged : acknowledged + len(again)]
    every = comparable([*told[:acknowledged], *again, *rest])
    assert [event for number, event in enumerate(every) if event not in every[:number]] == comparable(events_of(whole))
    assert_same_bits(weights_of(rest[-1]), weights_of(events_of(whole)[-1]))


def test_what_is_acknowledged_is_not_said_again(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec(acknowledged=True)
    told = followed(decoder, spec, 7, 4)
    training = FusedTraining(decoder)
    training.start(spec)
    again = next(event for event in training if event is not None)
    assert again == RetoldEvent(run_id="run-1", events=told[4:])
    training.acknowledge("run-1", 2)
    training.stop("run-1", pause=True)
    assert isinstance(events_of(training)[-1], StoppedEvent)
    assert resumed(decoder, spec)[0] == told[6:]


def test_a_pause_saves_what_is_not_acknowledged(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec, events = make_spec(acknowledged=True), []
    run = TrainingRun(decoder, spec)
    for item in run:
        events += events_of([item])
        if isinstance(item, StepEvent) and item.step == 3:
            run.stop(pause=True)
    assert isinstance(events.pop(), StoppedEvent)
    assert resumed(decoder, spec)[0] == events


def test_a_run_that_is_over_says_again_what_nobody_acknowledged(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec(acknowledged=True)
    *told, finished = events_of(TrainingRun(decoder, spec))
    again, rest = resumed(decoder, spec)
    assert again == told
    assert comparable(rest) == comparable([finished])


def test_a_state_from_before_there_was_a_journal_is_taken_up(
    decoder: Decoder, make_spec: MakeSpec, whole: Items
) -> None:
    spec = make_spec()
    told = followed(decoder, spec, 8, 0)
    assert not (Path(spec.workdir) / "unacknowledged.msgpack").exists()
    again, rest = resumed(decoder, msgspec.structs.replace(spec, acknowledged=True))
    assert again == []
    assert comparable(rest) == comparable(events_of(whole))[len(told) :]


def test_a_damaged_journal_ends_the_run_with_a_sentence(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec(acknowledged=True)
    followed(decoder, spec, 4, 0)
    (Path(spec.workdir) / "unacknowledged.msgpack").write_bytes(b"\x93torn")
    (failed,) = events_of(TrainingRun(decoder, spec))
    assert isinstance(failed, FailedEvent)
    assert failed.code == "resume_unreadable"


@pytest.mark.parametrize("kind", ["folds", "sweep"])
def test_the_learners_of_a_sweep_and_of_folds_have_one_journal(
    decoder: Decoder, make_spec: MakeSpec, tmp_path: Path, kind: str
) -> None:
    spec = several(make_spec, tmp_path, kind)
    expected = events_of(TrainingRun(decoder, msgspec.structs.replace(spec, workdir=str(tmp_path / "whole"))))
    told = followed(decoder, spec, len(expected) // 2, 1)
    again, rest = resumed(decoder, spec)
    assert again
    assert again == told[1 : 1 + len(again)]
    seen = [places(event) for event in [*told[:1], *again, *rest] if isinstance(event, Recorded)]
    assert {*seen} == {places(event) for event in expected if isinstance(event, Recorded)}
    assert isinstance(rest[-1], FinishedEvent)
    assert_same_bits(weights_of(rest[-1]), weights_of(expected[-1]))


def test_that_a_trial_has_ended_is_said_though_the_process_dies_at_that_moment(
    decoder: Decoder, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = several(make_spec, tmp_path, "sweep")
    replace_file = sweep.replace_file

    class KilledError(BaseException):
        """As SIGKILL: nothing of the run is told of it."""

    def killed(*args: Any) -> None:
        replace_file(*args)
        raise KilledError

    monkeypatch.setattr(sweep, "replace_file", killed)
    with pytest.raises(KilledError):
        events_of(TrainingRun(decoder, spec))
    monkeypatch.setattr(sweep, "replace_file", replace_file)
    again, rest = resumed(decoder, spec)
    last = again[-1]
    assert isinstance(last, TrialEvent)
    assert last.status == "stopped"
    ends = [event.trial for event in (*again, *rest) if isinstance(event, TrialEvent) and event.status != "running"]
    assert sorted(ends) == [0, 1, 2]


def test_what_nobody_acknowledges_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_EVENTS", 4)
    kept = Journal(tmp_path, keeps=True)
    events = [EvalEvent(run_id="r", step=n, valid_loss=0, valid_accuracy=0, base_loss=0, best=False) for n in range(7)]
    for event in events:
        kept.note(event)
    kept.acknowledge(4)  # three of them are gone already
    kept.save()
    assert Journal(tmp_path, keeps=True).restore() == events[4:]


def test_a_journal_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "unacknowledged.msgpack").mkdir()
    with pytest.raises(TrainingError, match="cannot be read"):
        Journal(tmp_path, keeps=True).restore()
    assert Journal(tmp_path, keeps=False).restore() == []


def several(make_spec: MakeSpec, directory: Path, kind: str) -> TrainSpec:
    """A run of three learners."""
    task = TaskSpec(name="rows", train_path=str(directory / "train.npz"), valid_path=str(directory / "valid.npz"))
    lora = LoraSpec(rank=4, alpha=8.0)
    if kind == "folds":
        return make_spec(
            acknowledged=True, folds=3, tasks=(msgspec.structs.replace(task, valid_path=""),), lora=lora, n_epochs=2
        )
    shape = {"alpha": 8.0, "n_epochs": 2, "batch_size": 4}
    trials = tuple({"rank": rank, "learning_rate": rate, **shape} for rank, rate in ((2, 1e-2), (4, 1e-2), (4, 1e-3)))
    return make_spec(acknowledged=True, trials=trials, lora=lora)


def places(event: TrainEvent) -> tuple[Any, ...]:
    """What an event is about."""
    names = ("step", "trial", "fold", "status")
    return (type(event).__name__, *(getattr(event, name, None) for name in names))
