"""Heads that learn by gradient, as whole runs: what they reach, what they leave behind, and where they go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tenora.adapters.heads import Head
from tenora.adapters.peft_format import read_adapter
from tenora.adapters.table_rows import RowKind
from tenora.data.dataset import TokenizedDataset
from tenora.data.labels import Labels
from tenora.data.rows import LABELLED, PAIRS
from tenora.model.decoder import Decoder
from tenora.model.spec import table_rows
from tenora.training.events import EvalEvent, FinishedEvent, HeadOutcome, StepEvent, StoppedEvent
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tests.support.full import full_but

from .runs import TrainingRun, assert_same_bits, comparable, events_of, failure, weights_of

# PEFT and transformers disagree on a name that one of them deprecates; PEFT looks for the base's configuration.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
LENGTH = 7  # of a row, and the token behind it where its head reads
Draw = Callable[[np.random.Generator, int], tuple[Any, Any]]


def texts(rng: np.random.Generator, rows: int) -> Any:
    return rng.integers(3, 300, (rows, LENGTH)).astype(np.int32)


def dataset(tokens: Any, labels: Labels | None, *, rows_per_example: int = 1) -> TokenizedDataset:
    rows = len(tokens)
    return TokenizedDataset(
        tokens=np.concatenate([tokens, np.full((rows, 1), 2, np.int32)], axis=1).reshape(-1),
        weights=np.tile(np.array([0] * LENGTH + [1], np.uint8), rows),
        offsets=np.arange(rows + 1, dtype=np.int64) * (LENGTH + 1),
        lines=np.arange(rows, dtype=np.int64) + 1,
        rows_per_example=rows_per_example,
        named_kind=LABELLED if labels is not None else PAIRS,
        labels=labels,
    )


def classes(rng: np.random.Generator, rows: int) -> TokenizedDataset:
    """Which of three tokens a row ends with."""
    tokens, label = texts(rng, rows), rng.integers(0, 3, rows)
    tokens[:, -1] = np.array([40, 90, 200])[label]
    return dataset(tokens, Labels("class", ("no", "perhaps", "yes"), label))


def marks(rng: np.random.Generator, rows: int) -> TokenizedDataset:
    """Whether the last token, and the one before it, is 40."""
    tokens, found = texts(rng, rows), rng.integers(0, 2, (rows, 2)).astype(bool)
    tokens[:, -1] = np.where(found[:, 0], 40, 90)
    tokens[:, -2] = np.where(found[:, 1], 40, 90)
    return dataset(tokens, Labels("classes", ("last", "before"), found))


def numbers(rng: np.random.Generator, rows: int) -> TokenizedDataset:
    """1000 plus ten for each of three tokens that a row ends with."""
    tokens, label = texts(rng, rows), rng.integers(0, 3, rows)
    tokens[:, -1] = np.array([40, 90, 200])[label]
    return dataset(tokens, Labels("number", (), 1000.0 + 10.0 * label))


def pairs(rng: np.random.Generator, examples: int) -> TokenizedDataset:
    """A positive has its anchor's first token at the end, a negative none of it."""
    rows = texts(rng, 3 * examples)
    rows[1::3, -1] = rows[0::3, 0] = rows[0::3, -1]
    return dataset(rows, None, rows_per_example=3)


def spec_of(
    directory: Path, made: Callable[..., TokenizedDataset], *, known: bool = False, **changes: Any
) -> TrainSpec:
    """A run over 48 examples that is measured on others, or on `known` ones."""
    train = made(np.random.default_rng(1), 48)
    train.save(directory / "train.npz")
    valid = train.select(np.arange(18)) if known else made(np.random.default_rng(2), 18)
    valid.save(directory / "valid.npz")
    task = TaskSpec(name="rows", train_path=str(directory / "train.npz"), valid_path=str(directory / "valid.npz"))
    settings = {
        "run_id": "run-1",
        "share_group": "g",
        "tasks": (task,),
        "workdir": str(directory / "work"),
        "base_model": "tiny",
        "method": "feature_extraction",
        "method_settings": {"train_layers": "lora"},
        "lora": LoraSpec(rank=4, alpha=8.0),
        "n_epochs": 4,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "tokens_per_microbatch": 24,
        "seed": 11,
    }
    return TrainSpec(**{**settings, **changes})


def run(decoder: Decoder, spec: TrainSpec) -> tuple[FinishedEvent, HeadOutcome]:
    finished = events_of(TrainingRun(decoder, spec))[-1]
    assert isinstance(finished, FinishedEvent), finished
    assert finished.head is not None
    return finished, finished.head


def heads_of(decoder: Decoder, finished: FinishedEvent) -> tuple[Head, ...]:
    return read_adapter(Path(finished.path), table_rows(decoder.spec), max_rank=64).heads


@pytest.mark.parametrize("layers", full_but(1, ["lora", 1]))
def test_a_head_of_classes_learns_with_its_adapter_and_peft_scores_the_held_out_rows_alike(
    decoder: Decoder, tiny_base: Path, tmp_path: Path, layers: str | int
) -> None:
    lora = LoraSpec(rank=4, alpha=8.0, last_layers=0 if layers == "lora" else 1)
    spec = spec_of(tmp_path, classes, method_settings={"train_layers": layers, "head_name": "answer"}, lora=lora)
    finished, outcome = run(decoder, spec)
    labels = TokenizedDataset.load(tmp_path / "valid.npz").labels
    assert labels is not None
    scores = np.array(outcome.scores)
    assert finished.valid_accuracy == float((scores.argmax(axis=1) == labels.values).mean()) > 0.9
    (head,) = heads_of(decoder, finished)
    assert head == Head(
        name="answer", kind="classification", start=0, stop=3, labels=("no", "perhaps", "yes"), multi_label=False
    )
    base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=3, dtype=torch.float32
    )
    model: Any = peft.PeftModelForSequenceClassification.from_pretrained(base, finished.path).eval()
    rows = TokenizedDataset.load(tmp_path / "valid.npz")
    ids = torch.from_numpy(rows.tokens.astype(np.int64)).view(-1, LENGTH + 1)[:, :-1]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(outcome.scores), model(input_ids=ids).logits.double(), atol=1e-4, rtol=1e-4, check_dtype=False
        )


def test_a_head_starts_from_the_most_common_label_and_says_how_good_it_is(decoder: Decoder, tmp_path: Path) -> None:
    evaluations = [e for e in events_of(TrainingRun(decoder, spec_of(tmp_path, classes))) if isinstance(e, EvalEvent)]
    start, last = evaluations[0], evaluations[-1]
    train, valid = (TokenizedDataset.load(tmp_path / f"{name}.npz").labels for name in ("train", "valid"))
    assert train is not None
    assert valid is not None
    shares = np.array(list(train.counts().values())) + 0.5
    shares = shares / shares.sum()
    assert start.valid_loss == pytest.approx(-np.log(shares[valid.values]).mean(), rel=1e-6)
    assert start.valid_accuracy == pytest.approx((valid.values == shares.argmax()).mean())
    assert start.metrics["auroc"] == 0.5
    assert last.valid_loss < start.valid_loss / 2
    assert last.metrics["macro_f1"] > 0.9
    assert last.metrics.keys() == {"macro_f1", "auroc", "calibration_error"}


@pytest.mark.parametrize("pooling", full_but("mean", ["last", "mean"]))
def test_several_labels_of_a_row_are_learned(decoder: Decoder, tmp_path: Path, pooling: str) -> None:
    settings = {"train_layers": "lora", "head_multi_label": True, "head_pooling": pooling}
    finished, outcome = run(decoder, spec_of(tmp_path, marks, known=True, method_settings=settings, n_epochs=8))
    labels = TokenizedDataset.load(tmp_path / "valid.npz").labels
    assert labels is not None
    assert finished.valid_accuracy == float(((np.array(outcome.scores) > 0) == labels.values).all(axis=1).mean()) > 0.7
    (head,) = heads_of(decoder, finished)
    assert (head.multi_label, head.pooling, head.labels) == (True, pooling, ("last", "before"))


@pytest.mark.parametrize("kind", full_but("scalar", ["regression", "scalar"]))
def test_numbers_are_learned_from_their_mean_in_units_of_their_deviation(
    decoder: Decoder, tmp_path: Path, kind: str
) -> None:
    spec = spec_of(tmp_path, numbers, method_settings={"train_layers": "lora", "head_type": kind})
    finished, outcome = run(decoder, spec)
    train, valid = (TokenizedDataset.load(tmp_path / f"{name}.npz").labels for name in ("train", "valid"))
    assert train is not None
    assert valid is not None
    found = np.array(outcome.scores)[:, 0]
    assert np.abs(found - valid.values).mean() < 3
    units = (found - valid.values) / train.values.std()
    assert finished.valid_loss == pytest.approx(float(np.square(units).mean()), rel=1e-3)
    weights = read_adapter(Path(finished.path), table_rows(decoder.spec), max_rank=64)
    (head,) = weights.heads
    parts = {part.kind: part.a for part in weights.parts}
    if kind == "regression":
        assert (head.mean, head.std) == pytest.approx((train.values.mean(), train.values.std()))
        assert parts.keys() == {RowKind.HEAD}
    else:
        assert (head.mean, head.std, head.bias) == (0.0, 1.0, True)
        assert parts[RowKind.HEAD_BIAS][0, 0] == pytest.approx(train.values.mean(), rel=1e-6)


@pytest.mark.parametrize("dims", full_but(16, [0, 16]))
def test_embeddings_bring_what_belongs_together_nearer(decoder: Decoder, tmp_path: Path, dims: int) -> None:
    settings = {"train_layers": "lora", "head_type": "embedding", "head_dims": dims}
    spec = spec_of(tmp_path, pairs, known=True, method_settings=settings, learning_rate=5e-3, n_epochs=6)
    events = events_of(TrainingRun(decoder, spec))
    finished = events[-1]
    assert isinstance(finished, FinishedEvent), finished
    assert finished.head is not None
    start = next(event for event in events if isinstance(event, EvalEvent))
    assert finished.head.metrics["recall_at_5"] > start.metrics["recall_at_5"] + 0.2
    assert finished.valid_loss < finished.base_loss
    (head,) = heads_of(decoder, finished)
    assert (head.kind, head.size, head.pooling) == ("embedding", dims, "mean")
    assert len(finished.head.scores[0]) == (dims or decoder.spec.hidden_size)


def test_a_step_of_embeddings_that_cannot_be_divided_is_refused_before_its_work(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenora.training.resident_base._ACTIVATION_BYTES", {"cpu": 2000 * 30})
    settings = {"train_layers": "lora", "head_type": "embedding"}
    failed = failure(TrainingRun(decoder, spec_of(tmp_path, pairs, method_settings=settings)))
    assert failed.code == "batch_too_large"
    assert "smaller batch_size" in failed.message


@pytest.mark.parametrize("made", full_but(classes, [classes, numbers, pairs]), ids=["classes", "numbers", "pairs"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    decoder: Decoder, tmp_path: Path, made: Callable[..., TokenizedDataset]
) -> None:
    kind = {classes: "classification", numbers: "regression", pairs: "embedding"}[made]
    settings = {"train_layers": "lora", "head_type": kind}
    spec = spec_of(tmp_path, made, method_settings=settings, n_epochs=2)
    whole = events_of(TrainingRun(decoder, spec))
    again = spec_of(tmp_path, made, method_settings=settings, n_epochs=2, workdir=str(tmp_path / "other"))
    first, parts = TrainingRun(decoder, again), list[Any]()
    for event in first:
        if event is not None:
            parts.append(event)
        if isinstance(event, StepEvent) and event.step == 11:
            first.stop(pause=True)
    assert isinstance(parts[-1], StoppedEvent)
    rest = events_of(TrainingRun(decoder, again))
    assert comparable(parts[:-1] + rest) == comparable(whole)
    assert_same_bits(weights_of(rest[-1]), weights_of(whole[-1]))


def test_a_head_goes_on_from_the_same_head_of_its_starting_adapter_and_never_loses_another(
    decoder: Decoder, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    finished, outcome = run(decoder, spec_of(tmp_path / "first", classes))
    further = spec_of(tmp_path / "second", classes, init_path=finished.path, learning_rate=1e-6, max_steps=1)
    events = events_of(TrainingRun(decoder, further))
    start = next(event for event in events if isinstance(event, EvalEvent))
    assert start.valid_loss == pytest.approx(finished.valid_loss, rel=1e-4)
    other = spec_of(
        tmp_path / "second",
        numbers,
        init_path=finished.path,
        method_settings={"train_layers": "lora", "head_type": "regression"},
    )
    failed = failure(TrainingRun(decoder, other))
    assert failed.code == "init_from_mismatch"
    assert "would be lost" in failed.message
    assert outcome.scores


def test_a_head_learns_at_ten_times_the_rate_of_the_low_rank_terms(decoder: Decoder, tmp_path: Path) -> None:
    """The first step of Adam is as large as its rate wherever there is a gradient."""
    settings = {"train_layers": "lora", "head_type": "embedding", "head_dims": 16}
    spec = spec_of(tmp_path, pairs, method_settings=settings, max_steps=1, warmup_ratio=0.0)
    events = events_of(TrainingRun(decoder, spec))
    (step,) = (event for event in events if isinstance(event, StepEvent))
    finished = weights_of(events[-1])
    head = finished["tenora_heads.weight"] - torch.eye(16, decoder.spec.hidden_size)
    assert float(head.abs().max()) == pytest.approx(10 * step.learning_rate, rel=1e-3)
    low_rank = max(float(part.abs().max()) for name, part in finished.items() if "lora_B" in name)
    assert low_rank == pytest.approx(step.learning_rate, rel=1e-3)


def test_more_last_layers_than_there_are_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, classes, lora=LoraSpec(rank=4, last_layers=9), method_settings={"train_layers": 9})
    failed = failure(TrainingRun(decoder, spec))
    assert "has 3 layers, and the last 9 were asked for" in failed.message
