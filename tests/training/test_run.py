"""A whole run: events, exact resume, stopping, and the ways in which it may fail without hurting anybody."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.training import learner
from tenora.training.checkpoint import fingerprint
from tenora.training.evaluation import Evaluation
from tenora.training.events import CheckpointEvent, EvalEvent, FinishedEvent, StepEvent, StoppedEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import LoraSpec, TrainSpec
from tests.support.patience import PATIENCE

from .runs import (
    Items,
    MakeSpec,
    TrainingRun,
    assert_same_bits,
    comparable,
    events_of,
    weights_of,
)


def test_events_of_a_run(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec(eval_interval=3)
    events = events_of(TrainingRun(decoder, spec))
    steps = [event for event in events if isinstance(event, StepEvent)]
    evaluations = [event for event in events if isinstance(event, EvalEvent)]
    checkpoints = [event for event in events if isinstance(event, CheckpointEvent)]
    assert [event.step for event in steps] == list(range(1, 9))
    assert {event.total_steps for event in steps} == {8}
    assert [event.epoch for event in steps][3::4] == [1.0, 2.0]
    assert [event.step for event in evaluations] == [0, 3, 6, 8]
    assert [event.step for event in checkpoints] == [3, 6, 8]
    first, *later = evaluations
    assert (first.valid_loss, first.best) == (first.base_loss, False)
    assert {event.base_loss for event in later} == {first.base_loss}
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    best = min(later, key=lambda event: event.valid_loss)
    assert (finished.step, finished.valid_loss, finished.steps) == (best.step, best.valid_loss, 8)
    assert [event.step for event in later if event.best][-1] == best.step
    trained = TokenizedDataset.load(Path(spec.tasks[0].train_path)).num_trained
    assert finished.trained_tokens == steps[-1].trained_tokens == 2 * trained
    # The window of a checkpoint is the steps since the one before, weighted by their tokens.
    counts = np.diff([0, *[event.trained_tokens for event in steps]])
    losses = np.array([event.train_loss for event in steps])
    assert checkpoints[1].train_loss == pytest.approx(np.average(losses[3:6], weights=counts[3:6]))


def test_loss_goes_down_on_rows_that_can_be_learned(decoder: Decoder, make_spec: MakeSpec, tmp_path: Path) -> None:
    TokenizedDataset.load(tmp_path / "train.npz").select(np.arange(5)).save(tmp_path / "valid.npz")
    events = events_of(
        TrainingRun(decoder, make_spec(n_epochs=8, learning_rate=2e-2, lora=LoraSpec(rank=4, alpha=8.0)))
    )
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert finished.valid_loss < 0.7 * finished.base_loss


def test_a_run_does_not_depend_on_where_it_lies_and_repeats_to_the_bit(
    decoder: Decoder, make_spec: MakeSpec, whole: Items
) -> None:
    again, other = events_of(TrainingRun(decoder, make_spec())), events_of(TrainingRun(decoder, make_spec(seed=12)))
    assert comparable(again) == comparable(events_of(whole))
    assert_same_bits(weights_of(again[-1]), weights_of(events_of(whole)[-1]))
    assert not torch.equal(*(next(iter(weights_of(events[-1]).values())) for events in (again, other)))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3, 0.5, 0.55, 0.9, 0.98])
def test_a_paused_run_goes_on_to_the_same_bits(
    decoder: Decoder, make_spec: MakeSpec, whole: Items, share: float
) -> None:
    spec = make_spec()
    run, items = TrainingRun(decoder, spec), []
    for number, item in enumerate(run):
        items.append(item)
        if number == int(share * len(whole)):
            run.stop(pause=True)
    events = events_of(items)
    done = len([event for event in events if isinstance(event, StepEvent)])
    assert events.pop() == StoppedEvent(run_id="run-1", step=done, paused=True)
    rest = events_of(TrainingRun(decoder, spec))
    assert_same_bits(weights_of(rest[-1]), weights_of(events_of(whole)[-1]))
    # An evaluation that was interrupted is told again; nothing else is.
    told = [event for event in comparable(events) if event not in comparable(rest)]
    assert told + comparable(rest) == comparable(events_of(whole))


def test_the_state_of_a_run_that_the_first_release_began_is_taken_up() -> None:
    plan: dict[str, Any] = {"run_id": "r", "group": "g", "workdir": "w", "base_model": "b"}
    plan["tasks"] = [{"name": "a", "train_path": "t", "valid_path": "v"}]
    plan["lora"] = {"target_modules": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]}
    rows = TokenizedDataset(
        tokens=np.arange(8, dtype=np.int32),
        weights=np.ones(8, np.uint8),
        offsets=np.array([0, 4, 8], np.int64),
        lines=np.array([1, 2], np.int64),
    )
    # As that release named it. A field that comes to TrainSpec must leave it so, or every job under way is lost.
    name = "e698e1779f6f914b5ef48e29f73ec098226b9d8f960fc1ef89cbe5a468f94e5b"
    assert fingerprint(msgspec.convert(plan, TrainSpec), rows, rows) == name


def test_a_run_that_is_killed_goes_on_to_the_same_bits(
    decoder: Decoder, tiny_base: Path, make_spec: MakeSpec, whole: Items, tmp_path: Path
) -> None:
    spec = make_spec()
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(spec))
    program = f"""
import os, signal, msgspec, torch
from pathlib import Path
from tenora.model.loading import load_decoder
from tenora.training import learner
from tenora.training.evaluation import Evaluation
from tenora.training.fusion import FusedTraining
from tenora.training.events import StepEvent
from tenora.training.spec import TrainSpec
torch.set_num_threads(1)
learner.STATE_INTERVAL_SECONDS = 0.0
spec = msgspec.json.decode(Path({str(tmp_path / "spec.json")!r}).read_bytes(), type=TrainSpec)
decoder = load_decoder(Path({str(tiny_base)!r}), device=torch.device("cpu"), dtype=torch.float32)
countdown = -1
training = FusedTraining(decoder)
training.start(spec)
for item in training:
    if isinstance(item, StepEvent) and item.step == 6:
        countdown = 9
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", program], check=False, env=environment, timeout=PATIENCE)
    assert killed.returncode == -9
    (Path(spec.workdir) / "checkpoints" / ".step-000008.torn").mkdir()
    rest = events_of(TrainingRun(decoder, spec))
    assert [event.step for event in rest if isinstance(event, StepEvent)] == [7, 8]
    assert comparable(rest) == comparable(events_of(whole))[-len(rest) :]
    assert_same_bits(weights_of(rest[-1]), weights_of(events_of(whole)[-1]))
    assert {path.name for path in (Path(spec.workdir) / "checkpoints").iterdir()} == {"step-000004", "step-000008"}


def test_a_finished_run_that_is_started_again_only_says_so(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec()
    finished = events_of(TrainingRun(decoder, spec))[-1]
    assert load_file(Path(spec.workdir) / "resume.safetensors") == {}  # nothing waits for weights and moments
    assert comparable(events_of(TrainingRun(decoder, spec))) == comparable([finished])


def test_cancelling_gives_up_the_step(decoder: Decoder, make_spec: MakeSpec) -> None:
    spec = make_spec()
    run, items = TrainingRun(decoder, spec), []
    for item in run:
        items.append(item)
        if isinstance(item, StepEvent) and item.step == 2:
            run.stop(pause=False)
    assert items[-1] == StoppedEvent(run_id="run-1", step=2, paused=False)
    assert isinstance(items[-2], StepEvent)


def test_only_the_best_and_the_latest_checkpoints_stay(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([13.0, 12.5, 11.5, 12.0, 12.1, 12.2, 12.3, 12.4, 12.5])

    def told(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield
        return Evaluation(next(losses), 0.5, [1.0], [1], [[-1.0]], [1.0], [1])

    monkeypatch.setattr(learner, "measure", told)
    spec = make_spec(eval_interval=1)
    finished = events_of(TrainingRun(decoder, spec))[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.step, finished.valid_loss, finished.base_loss) == (2, 11.5, 13.0)
    assert Path(finished.path).name == "step-000002"
    kept = sorted(path.name for path in (Path(spec.workdir) / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000006", "step-000007", "step-000008"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_the_exported_adapter_gives_peft_the_loss_that_was_told(
    decoder: Decoder, tiny_base: Path, make_spec: MakeSpec
) -> None:
    text = (5, 9, 30, 7, 11, 40, 3)
    spec = make_spec(general_text=text)
    finished = events_of(TrainingRun(decoder, spec))[-1]
    assert isinstance(finished, FinishedEvent)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, finished.path)
    valid, losses, hits = TokenizedDataset.load(Path(spec.tasks[0].valid_path)), [], []
    for row in range(len(valid)):
        tokens, weights = valid.row(row)
        ids, learned = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(weights[1:].astype(bool))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1][learned]
        losses.append(F.cross_entropy(logits, ids[1:][learned], reduction="none"))
        hits.append(logits.argmax(-1) == ids[1:][learned])
    assert float(torch.cat(losses).mean()) == pytest.approx(finished.valid_loss, rel=1e-4)
    assert float(torch.cat(hits).float().mean()) == pytest.approx(finished.valid_accuracy, abs=0.03)
    assert finished.valid_loss != pytest.approx(finished.base_loss, rel=1e-3)
    ids = torch.tensor([text])
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(finished.general_loss, rel=1e-4)
        with model.disable_adapter():
            assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(finished.base_general_loss, rel=1e-4)
    assert finished.general_loss != pytest.approx(finished.base_general_loss, rel=1e-3)


def test_the_callers_modes_and_random_numbers_are_left_alone(decoder: Decoder, make_spec: MakeSpec) -> None:
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with torch.inference_mode():
        items = TrainingRun(decoder, make_spec())
        assert [torch.is_inference_mode_enabled() for _ in items].count(False) == 0
    for _ in TrainingRun(decoder, make_spec()):
        assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_run_that_ended_has_given_its_room_back(decoder: Decoder, make_spec: MakeSpec) -> None:
    training = FusedTraining(decoder)
    training.start(make_spec())
    for _ in range(20):
        training.advance()
    held = weakref.ref(training.host.arena.tables.arena)
    assert held().numel() > 0
    training.stop_all(pause=False)
    assert isinstance([event for event in training if event is not None][-1], StoppedEvent)
    assert held() is None
    assert len(training.host.arena) == 0
