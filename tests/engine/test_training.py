"""A real training run inside the engine, with requests answered meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tenora.data.dataset import TokenizedDataset
from tenora.engine.messages import StartTraining, StopTraining
from tenora.model.decoder import Decoder
from tenora.training.events import EvalEvent, FinishedEvent, StepEvent, StoppedEvent
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tests.engine.driver import Driver, greedy, load_peft, ref_of
from tests.engine.requests import generate, sampling

SENTENCE = [11, 47, 200, 33, 90, 151, 62, 310]


def rows(count: int) -> TokenizedDataset:
    """The same sentence over and over: soon known by heart."""
    weights = np.ones(len(SENTENCE), dtype=np.uint8)
    weights[0] = 0
    return TokenizedDataset(
        tokens=np.tile(np.array(SENTENCE, dtype=np.int32), count),
        weights=np.tile(weights, count),
        offsets=np.arange(count + 1, dtype=np.int64) * len(SENTENCE),
        lines=np.arange(1, count + 1, dtype=np.int64),
    )


def make_spec(directory: Path, n_epochs: int) -> TrainSpec:
    rows(16).save(directory / "train.npz")
    rows(2).save(directory / "valid.npz")
    return TrainSpec(
        run_id="run",
        share_group="tenant",
        tasks=(
            TaskSpec(name="rows", train_path=str(directory / "train.npz"), valid_path=str(directory / "valid.npz")),
        ),
        workdir=str(directory / "work"),
        base_model="tiny",
        lora=LoraSpec(rank=8),
        batch_size=4,
        learning_rate=1e-2,
        n_epochs=n_epochs,
    )


def test_a_run_ends_in_an_adapter_that_the_same_engine_serves(
    driver: Callable[..., Driver], tiny_base: Path, tmp_path: Path
) -> None:
    tiny = driver()
    requests = [generate([5, seed], sampling(max_tokens=20)) for seed in range(4, 8)]
    expected = [driver().run(request)[0].tokens for request in requests]
    tiny.engine.add(StartTraining(make_spec(tmp_path, n_epochs=10)))
    answered = 0
    while tiny.engine.has_work:
        if answered < len(requests) and not tiny.engine.scheduler.live():
            tiny.add(requests[answered])
            answered += 1
        tiny.step()
    assert [tiny.answers[request.request_id].tokens for request in requests] == expected
    finished = tiny.training[-1]
    assert isinstance(finished, FinishedEvent)
    assert finished.valid_loss < 0.2 < finished.base_loss
    steps = [event for event in tiny.training if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == list(range(1, 41))
    assert any(isinstance(event, EvalEvent) for event in tiny.training)
    assert tiny.engine.stats().trained_tokens == steps[-1].trained_tokens == 10 * 16 * 7
    assert tiny.engine.stats().training_runs == 0

    adapter = ref_of(Path(finished.path))
    assert tiny.tokens(SENTENCE[:1], sampling(max_tokens=7), adapter) == SENTENCE[1:]
    assert greedy(load_peft(tiny_base, adapter), SENTENCE[:1], 7)[0] == SENTENCE[1:]
    assert tiny.tokens(requests[0].token_ids, requests[0].sampling) == expected[0], "the base has changed"


def test_a_paused_run_goes_on_where_it_was(driver: Callable[..., Driver], decoder: Decoder, tmp_path: Path) -> None:
    tiny = driver()
    spec = make_spec(tmp_path, n_epochs=3)
    tiny.engine.add(StartTraining(spec))
    while not any(isinstance(event, StepEvent) and event.step == 5 for event in tiny.training):
        tiny.step()
    tiny.engine.add(StopTraining("run", pause=True))
    while tiny.engine.has_work:
        tiny.step()
    stopped = tiny.training[-1]
    assert isinstance(stopped, StoppedEvent)
    assert stopped.paused
    other = driver()  # after a restart
    other.engine.add(StartTraining(spec))
    while other.engine.has_work:
        other.step()
    first = next(event for event in other.training if isinstance(event, StepEvent))
    assert first.step == stopped.step + 1
    assert isinstance(other.training[-1], FinishedEvent)
    assert other.training[-1].steps == 12
