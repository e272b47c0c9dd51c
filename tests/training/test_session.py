"""Sessions: the bits of the supervised plan, states that are taken up again, and commands that end themselves alone."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tenora.data.rows import ANSWERS
from tenora.model.decoder import Decoder
from tenora.training import fusion
from tenora.training.commands import (
    AdamWSettings,
    Loaded,
    LoadState,
    Losses,
    OptimStep,
    Refused,
    Row,
    SaveAdapter,
    Saved,
    SaveState,
    SessionReady,
    Stepped,
)
from tenora.training.corpus import Corpus
from tenora.training.events import FailedEvent, StepEvent, StoppedEvent
from tenora.training.fusion import FusedTraining
from tenora.training.inbox import MAX_WAITING
from tenora.training.plans import session
from tenora.training.schedule import learning_rate
from tenora.training.spec import LoraSpec
from tests.data.rows import random_rows

from .runs import MakeSpec, TrainingRun, assert_same_bits, events_of
from .sessions import Sessions, forward_backward, rows_of, session_spec

DATA = random_rows(14, seed=1)
STEP = AdamWSettings(learning_rate=5e-3, weight_decay=0.01, beta2=0.95, epsilon=1e-12)


def step(number: int, settings: AdamWSettings = STEP, **changes: Any) -> OptimStep:
    return OptimStep(command_id=number, settings=settings, **changes)


def adapter_of(sessions: Sessions, name: str, run_id: str = "session") -> dict[str, torch.Tensor]:
    (saved,) = sessions.do(SaveAdapter(command_id=99, name=name), run_id=run_id)
    assert isinstance(saved, Saved), saved
    return load_file(Path(saved.path) / "adapter_model.safetensors")


def train(sessions: Sessions, first: int, last: int, run_id: str = "session", **changes: Any) -> list[Any]:
    """Steps on three rows each, which depend on the step alone."""
    answers = []
    for number in range(first, last):
        rows = rows_of(DATA, [(3 * number + offset) % 14 for offset in range(3)])
        answers += sessions.do(forward_backward(2 * number, rows), step(2 * number + 1, **changes), run_id=run_id)
    return answers


def test_commands_give_the_bits_of_the_supervised_plans_own_steps(
    decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(lora=LoraSpec(rank=4, alpha=8.0), weight_decay=0.01)
    steps = [event for event in events_of(TrainingRun(decoder, spec)) if isinstance(event, StepEvent)]
    corpus = Corpus.load(spec.tasks, kind=ANSWERS)
    sessions = Sessions(decoder, session_spec(tmp_path, seed=spec.seed))
    assert sessions.events["session"] == [SessionReady(run_id="session", step=0)]
    for event in steps:
        number = event.step - 1
        rate = learning_rate(
            number,
            peak=spec.learning_rate,
            total_steps=len(steps),
            warmup_ratio=spec.warmup_ratio,
            scheduler=spec.scheduler,
        )
        rows = rows_of(corpus.train, corpus.batch(number, spec.batch_size, seed=spec.seed))
        losses, stepped = sessions.do(
            forward_backward(2 * number, rows),
            step(2 * number + 1, AdamWSettings(learning_rate=rate, weight_decay=0.01), max_grad_norm=1.0),
        )
        assert isinstance(losses, Losses)
        assert isinstance(stepped, Stepped)
        assert (stepped.step, stepped.grad_norm) == (event.step, event.grad_norm)
        assert losses.total == pytest.approx(event.train_loss, rel=1e-6)
    assert len(steps) == 8
    theirs = load_file(Path(spec.workdir) / "checkpoints" / "step-000008" / "adapter_model.safetensors")
    assert_same_bits(adapter_of(sessions, "end"), theirs)


def test_gradients_gather_until_a_step_is_asked_for(decoder: Decoder, tmp_path: Path) -> None:
    specs = [session_spec(tmp_path, run_id) for run_id in ("whole", "halves")]
    sessions = Sessions(decoder, *specs)
    weight = 0.05
    (whole, one) = sessions.do(forward_backward(1, rows_of(DATA, [0, 1, 2, 3], weight)), step(2), run_id="whole")
    told = sessions.do(
        forward_backward(1, rows_of(DATA, [0, 1], weight)),
        forward_backward(2, rows_of(DATA, [4, 5], weight), backward=False),
        forward_backward(3, rows_of(DATA, [2, 3], weight)),
        step(4),
        step(5),
        run_id="halves",
    )
    assert [answer.command_id for answer in told] == [1, 2, 3, 4, 5]
    assert told[0].losses + told[2].losses == [pytest.approx(row, rel=1e-5) for row in whole.losses]
    assert told[3].grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert isinstance(told[4], Refused)
    assert told[4].code == "no_gradient"


def test_a_state_is_taken_up_again_to_the_bit(decoder: Decoder, tmp_path: Path) -> None:
    sessions = Sessions(decoder, session_spec(tmp_path))
    train(sessions, 0, 3)
    (saved,) = sessions.do(SaveState(command_id=50, name="three"))
    train(sessions, 3, 6)
    expected = adapter_of(sessions, "six")
    loaded = sessions.do(LoadState(command_id=51, path=saved.path))
    assert loaded == [Loaded(run_id="session", command_id=51, step=3)]
    train(sessions, 3, 6)
    assert_same_bits(adapter_of(sessions, "again"), expected)
    other = Sessions(decoder, session_spec(tmp_path, "other", seed=3))
    other.do(LoadState(command_id=1, path=saved.path), run_id="other")
    train(other, 3, 6, run_id="other")
    assert_same_bits(adapter_of(other, "end", "other"), expected)
    other.do(LoadState(command_id=2, path=saved.path, optimizer=False), run_id="other")
    train(other, 3, 6, run_id="other")
    fresh = adapter_of(other, "fresh", "other")
    assert any(not torch.equal(fresh[name], expected[name]) for name in fresh), "the moments were not taken"


@pytest.mark.parametrize("layers", [0, 5])
def test_a_paused_session_goes_on_with_its_gradient_and_without_what_it_was_at(
    decoder: Decoder, tmp_path: Path, layers: int
) -> None:
    whole = Sessions(decoder, session_spec(tmp_path, "whole"))
    train(whole, 0, 3, run_id="whole")
    sessions = Sessions(decoder, session_spec(tmp_path))
    train(sessions, 0, 2)
    rows = [rows_of(DATA, [(3 * 2 + offset) % 14 for offset in range(3)], weight) for weight in (None, 3.0)]
    sessions.do(forward_backward(4, rows[0]))
    if layers:
        sessions.training.put("session", forward_backward(5, rows[1]))
        for _ in range(layers):
            sessions.advance()
        assert sessions.training.host.queue.has_work, "it is in the middle of a pass"
    assert sessions.stop(pause=True) == StoppedEvent(run_id="session", step=2, paused=True)
    resumed = Sessions(decoder, session_spec(tmp_path))
    assert resumed.events["session"] == [SessionReady(run_id="session", step=2)]
    resumed.do(step(5))
    assert_same_bits(adapter_of(resumed, "end"), adapter_of(whole, "end", "whole"))


@pytest.mark.parametrize("told", [True, False])
def test_a_session_that_is_killed_goes_on_from_the_state_that_was_saved_last(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr(session, "STATE_INTERVAL_SECONDS", math.inf if told else 0.0)
    killed = Sessions(decoder, session_spec(tmp_path))
    train(killed, 0, 2)
    if told:
        killed.do(SaveState(command_id=50, name="two"))
        train(killed, 2, 3)
    killed.do(forward_backward(6, rows_of(DATA, [0])))
    resumed = Sessions(decoder, session_spec(tmp_path))
    assert resumed.events["session"] == [SessionReady(run_id="session", step=2)]
    train(resumed, 2, 4)
    whole = Sessions(decoder, session_spec(tmp_path, "whole"))
    train(whole, 0, 4, run_id="whole")
    assert_same_bits(adapter_of(resumed, "end"), adapter_of(whole, "end", "whole"))


def test_a_session_of_a_mixed_batch_is_the_one_it_would_be_alone(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [STEP, AdamWSettings(learning_rate=1e-2, beta1=0.5, beta2=0.9, epsilon=1e-3), STEP]
    specs = [
        session_spec(tmp_path, f"run-{number}", lora=LoraSpec(rank=rank, alpha=8.0), share_group=f"tenant-{number % 2}")
        for number, rank in enumerate((4, 1, 16))
    ]
    alone = []
    for spec, own in zip(specs, settings, strict=True):
        sessions = Sessions(decoder, spec)
        train(sessions, 0, 3, run_id=spec.run_id, settings=own)
        alone.append(adapter_of(sessions, "alone", spec.run_id))
    seen: list[int] = []
    run = FusedTraining._run
    monkeypatch.setattr(FusedTraining, "_run", lambda self, works: (seen.append(len(works)), run(self, works))[1])
    together = Sessions(decoder, *specs)
    for number in range(3):
        rows = rows_of(DATA, [(3 * number + offset) % 14 for offset in range(3)])
        for spec, own in zip(specs, settings, strict=True):
            together.training.put(spec.run_id, forward_backward(2 * number, rows))
            together.training.put(spec.run_id, step(2 * number + 1, own))
        together.settle()
    assert max(seen) == 3, "their rows shared passes"
    for spec, expected in zip(specs, alone, strict=True):
        assert_same_bits(adapter_of(together, "together", spec.run_id), expected)


def test_a_pass_that_fails_is_tried_again_on_the_gradient_that_it_began_with(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(sessions: Sessions, *, fails: bool) -> dict[str, torch.Tensor]:
        def put(number: int) -> None:
            for run_id in ("session", "beside"):
                sessions.training.put(run_id, forward_backward(number, rows_of(DATA, [number, number + 1])))
            sessions.settle()

        put(1)
        whole, failed = fusion.forward_backward, []

        def failing(*args: Any, **keywords: Any) -> Generator[None, None, Any]:
            found = yield from whole(*args, **keywords)
            if fails and not failed:
                failed.append(True)
                raise MemoryError
            return found

        monkeypatch.setattr(fusion, "forward_backward", failing)
        put(2)
        assert bool(failed) == fails
        monkeypatch.setattr(fusion, "forward_backward", whole)
        sessions.do(step(3))
        return adapter_of(sessions, "end")

    names = ("session", "beside")
    clean = run(Sessions(decoder, *(session_spec(tmp_path / "a", name) for name in names)), fails=False)
    assert_same_bits(run(Sessions(decoder, *(session_spec(tmp_path / "b", name) for name in names)), fails=True), clean)


NAN = float("nan")
BAD = [
    (forward_backward(1, []), "rows"),
    (forward_backward(1, [Row([5], [None])]), "tokens"),
    (forward_backward(1, [Row([5, 6], [None])]), "weights"),
    (forward_backward(1, [Row([5, 6], [1.0, 1.0])]), "first token"),
    (forward_backward(1, [Row([5, 6], [None, None])]), "no token"),
    (forward_backward(1, [Row([5, 10**6], [None, 1.0])]), "model's"),
    (forward_backward(1, [Row([-1, 6], [None, 1.0])]), "model's"),
    (forward_backward(1, [Row([5, 6], [None, NAN])]), "ordinary"),
    (forward_backward(1, [Row([5] * 2000, [None, *[1.0] * 1999])]), "2000 tokens"),
    (step(1, AdamWSettings(learning_rate=NAN)), "learning_rate"),
    (step(1, AdamWSettings(learning_rate=1e-3, beta2=1.0)), "beta2"),
    (step(1, max_grad_norm=-1.0), "max_grad_norm"),
    (SaveState(command_id=1, name="../elsewhere"), "name"),
    (SaveAdapter(command_id=1, name=".hidden"), "name"),
    (LoadState(command_id=1, path="/nowhere.safetensors"), "cannot be read"),
]


def test_a_command_that_cannot_be_carried_out_is_refused_and_changes_nothing(decoder: Decoder, tmp_path: Path) -> None:
    sessions, clean = (Sessions(decoder, session_spec(tmp_path / name)) for name in "ab")
    rows = rows_of(DATA, [0, 1])
    for each in (sessions, clean):
        each.do(forward_backward(0, rows))
    for command, said in BAD:
        (refused,) = sessions.do(command)
        assert isinstance(refused, Refused), command
        assert said in refused.message, refused
    for each in (sessions, clean):
        each.do(step(2))
    assert_same_bits(adapter_of(sessions, "end"), adapter_of(clean, "end"))


def test_a_loss_that_is_no_number_names_its_row(decoder: Decoder, tmp_path: Path) -> None:
    sessions = Sessions(decoder, session_spec(tmp_path))
    sessions.training.host.arena._adapters[0].weights.fill_(float("inf"))
    (refused,) = sessions.do(forward_backward(1, rows_of(DATA, [0, 1])))
    assert (refused.code, "row 0" in refused.message) == ("non_finite", True)


def test_a_session_that_waits_holds_up_nobody_and_nothing_spins(
    decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
) -> None:
    sessions = Sessions(decoder, session_spec(tmp_path))
    assert sessions.training.active
    assert not sessions.training.busy
    assert sessions.training.advance() is None
    sessions.training.start(make_spec(run_id="job"))
    sessions.settle()
    assert sessions.events["job"][-1].steps == 8  # type: ignore[union-attr]
    assert sessions.training.active == 1
    assert len(sessions.events["session"]) == 1


def test_who_has_idled_has_no_claim_on_what_others_had_meanwhile(decoder: Decoder, tmp_path: Path) -> None:
    specs = [session_spec(tmp_path, run_id, share_group=run_id) for run_id in ("busy", "idle")]
    sessions = Sessions(decoder, *specs)
    train(sessions, 0, 1, run_id="idle")
    train(sessions, 0, 4, run_id="busy")
    groups = sessions.training.host.queue._share_groups
    before, there = groups["idle"].served, groups["busy"].served
    assert before < there
    for run_id in ("busy", "idle"):
        sessions.training.put(run_id, forward_backward(20, rows_of(DATA, [0])))
    sessions.settle()
    assert groups["idle"].served > there, "it goes on where the busy one stands"
    assert groups["idle"].served == groups["busy"].served


def test_commands_beyond_the_bound_and_of_runs_that_take_none_are_refused(
    decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
) -> None:
    sessions = Sessions(decoder, session_spec(tmp_path))
    rows = rows_of(DATA, [0])
    answers = sessions.do(*(forward_backward(number, rows, backward=False) for number in range(MAX_WAITING + 2)))
    refused = [answer.command_id for answer in answers if isinstance(answer, Refused)]
    assert refused == [MAX_WAITING, MAX_WAITING + 1]
    sessions.training.start(make_spec(run_id="job"))
    assert sessions.do(step(1), run_id="job")[0].code == "no_commands"
    assert sessions.do(step(1), run_id="nobody")[0].code == "unknown_run"


def test_a_session_that_cannot_be_says_why(decoder: Decoder, tmp_path: Path) -> None:
    sessions = Sessions(decoder, session_spec(tmp_path, lora=LoraSpec(rank=4, dropout=0.1)))
    (failed,) = sessions.events["session"]
    assert isinstance(failed, FailedEvent)
    assert failed.code == "invalid_session"
    first = Sessions(decoder, session_spec(tmp_path))
    first.stop(pause=True)
    (failed,) = Sessions(decoder, session_spec(tmp_path, lora=LoraSpec(rank=5))).events["session"]
    assert isinstance(failed, FailedEvent)
    assert failed.code == "resume_mismatch"
