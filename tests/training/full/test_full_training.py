"""Full fine-tuning computes what transformers and torch compute, and goes on with the same bits after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tenora.training.events import EvalEvent, FinishedEvent, FullResult, StepEvent, StoppedEvent
from tenora.training.full import merged
from tenora.training.full.merged import digest_of, write_merged
from tenora.training.plans.single import load_corpus
from tests.support.threads import one_thread
from tests.training.runs import comparable, events_of, write_rows

from .runs import full_spec, full_training, oracle

EVERYTHING = {"embeddings": True, "norms": True}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path


def model_of(event: object) -> FullResult:
    assert isinstance(event, FinishedEvent), event
    assert event.full is not None
    return event.full


def weights_in(directory: str) -> dict[str, torch.Tensor]:
    return {name: tensor for path in Path(directory).glob("*.safetensors") for name, tensor in load_file(path).items()}


ONLY_LAYERS = "self_attn", "mlp"
CASES = [
    pytest.param("smollm2", {}, lambda name: any(part in name for part in ONLY_LAYERS), id="matrices"),
    pytest.param("smollm2", EVERYTHING, lambda name: True, id="everything, tied"),
    pytest.param("llama", EVERYTHING, lambda name: True, id="everything, a head of its own"),
    pytest.param("qwen2", {**EVERYTHING, "layers": "last 2"}, lambda name: ".layers.0." not in name, id="biases"),
    pytest.param(
        "smollm2", {"layers": "1"}, lambda name: ".layers.1." in name and "norm" not in name, id="a layer between"
    ),
]


@pytest.mark.parametrize(("family", "own", "trains"), CASES)
def test_one_step_is_that_of_transformers_and_torchs_adamw(
    make_tiny: Callable[[str], Path], rows: Path, family: str, own: dict[str, object], trains: Callable[[str], bool]
) -> None:
    base = make_tiny(family)
    # Adam divides a gradient that is zero but for rounding by itself: the rate bounds what that comes to.
    course = {"max_steps": 1, "scheduler": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-4}
    decay = {"weight_decay": 0.1, "max_grad_norm": 1.0}
    spec = full_spec(rows, "work", own=own, **course, **decay)
    events = events_of(full_training(base, spec))
    step = next(event for event in events if isinstance(event, StepEvent))
    corpus = load_corpus(spec)
    batch = corpus.batch(0, spec.batch_size, seed=spec.seed)
    loss, norm, expected = oracle(base, corpus.train, batch, trains, rate=step.learning_rate, **decay)
    assert (step.train_loss, step.grad_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
    found = weights_in(model_of(events[-1]).path)
    before = weights_in(str(base))
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
        assert torch.equal(tensor, before[name]) != trains(name), name


def test_transformers_loads_the_result_and_comes_to_the_held_out_loss_that_is_told(tiny_base: Path, rows: Path) -> None:
    spec = full_spec(rows, "work")
    finished = events_of(full_training(tiny_base, spec))[-1]
    found = model_of(finished)
    corpus = load_corpus(spec)
    loss, _, _ = oracle(
        Path(found.path), corpus.valid, range(5), lambda name: True, rate=0.0, max_grad_norm=1.0, weight_decay=0.0
    )
    assert found.valid_loss == pytest.approx(loss, rel=1e-5)
    assert isinstance(finished, FinishedEvent)
    assert found.valid_loss < finished.base_loss
    assert transformers.AutoTokenizer.from_pretrained(found.path).chat_template
    assert found.digest == digest_of(Path(found.path))


def test_the_best_evaluation_wins_not_the_last(tiny_base: Path, rows: Path) -> None:
    """With such a rate the run gets worse after its first epoch."""
    events = events_of(
        full_training(tiny_base, full_spec(rows, "work", learning_rate=2e-2, n_epochs=3, eval_interval=2))
    )
    evaluations = [event for event in events if isinstance(event, EvalEvent) and event.step]
    best = min(evaluations, key=lambda event: event.valid_loss)
    assert best.step < evaluations[-1].step
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.step, model_of(finished).valid_loss) == (best.step, best.valid_loss)


def test_a_run_that_is_left_anywhere_goes_on_with_the_same_bits(tiny_base: Path, rows: Path) -> None:
    whole = events_of(full_training(tiny_base, full_spec(rows, "whole", eval_interval=3)))
    spec = full_spec(rows, "left", eval_interval=3)
    told: dict[tuple[type, int], object] = {}
    for boundary in (9, 14, 23):  # killed: nothing is saved but what the run has saved itself
        items = iter(full_training(tiny_base, spec))
        for _ in range(boundary):
            note(told, next(items))
        items.close()  # type: ignore[attr-defined]
    for item in full_training(tiny_base, spec):
        note(told, item)
    expected: dict[tuple[type, int], object] = {}
    for item in whole:
        note(expected, item)
    assert told.keys() == expected.keys()
    assert all(told[key] == expected[key] for key in told if key[0] in {StepEvent, EvalEvent})
    ends = [next(end for (kind, _), end in seen.items() if kind is FinishedEvent) for seen in (told, expected)]
    assert model_of(ends[0]).digest == model_of(ends[1]).digest


def note(told: dict[tuple[type, int], object], item: object) -> None:
    if item is not None:
        (found,) = comparable([item])  # type: ignore[list-item]
        told[type(item), getattr(item, "step", -1)] = found


def test_a_paused_run_saves_what_it_has(tiny_base: Path, rows: Path) -> None:
    spec = full_spec(rows, "work", eval_interval=100)
    training = full_training(tiny_base, spec)
    events = []
    for item in training:
        events += [] if item is None else [item]
        if isinstance(item, StepEvent) and item.step == 3:
            training.run.stop(pause=True)
    assert isinstance(events[-1], StoppedEvent)
    assert events[-1].paused
    again = [event for event in events_of(full_training(tiny_base, spec)) if isinstance(event, StepEvent)]
    assert [event.step for event in again] == [4, 5, 6, 7, 8]


def test_only_the_best_and_the_latest_weights_stay_on_the_disk(tiny_base: Path, rows: Path) -> None:
    spec = full_spec(rows, "work", eval_interval=1)
    events_of(full_training(tiny_base, spec))
    assert len(list(Path(spec.workdir, "checkpoints").iterdir())) <= 2


def test_a_large_model_is_divided_into_files_that_transformers_finds(tiny_base: Path, tmp_path: Path) -> None:
    before = weights_in(str(tiny_base))
    name = "model.layers.1.mlp.up_proj.weight"
    changed = {name: before[name] + 1.0}
    digest = write_merged(tmp_path / "model", tiny_base, changed, max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    assert digest == digest_of(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = model.state_dict()
    assert model.dtype == torch.float32
    assert all(torch.equal(found[key], changed.get(key, value)) for key, value in before.items())
    assert merged.MAX_SHARD_BYTES == 5 * 10**9
