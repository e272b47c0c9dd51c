"""Frozen features and the head on them, beside whatever else trains, as transformers and scikit-learn have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tenora.adapters.peft_format import read_adapter
from tenora.data.dataset import TokenizedDataset, tokenize_file
from tenora.data.division import divide
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tenora.training.events import FailedEvent, FinishedEvent, ProgressEvent, StoppedEvent, TrainEvent
from tenora.training.fusion import FusedTraining
from tenora.training.plans import features
from tenora.training.spec import TaskSpec, TrainSpec
from tests.data.rows import write_lines

METHOD = "feature_extraction"
WORDS = ("good", "bad", "fair")


@pytest.fixture(scope="module")
def decoder(tiny_base: Path) -> Decoder:
    return load_decoder(tiny_base, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def rows(tmp_path: Path, tiny_base: Path) -> tuple[TokenizedDataset, TokenizedDataset]:
    """Rows whose first word tells the label, with some noise; and those held out."""
    rng = np.random.default_rng(0)
    told = rng.integers(0, 3, 60)
    said = np.where(rng.random(60) < 0.2, rng.integers(0, 3, 60), told)
    pairs = zip(told, said, strict=True)
    lines = [{"text": f"{WORDS[a]} day number {i}", "label": WORDS[b]} for i, (a, b) in enumerate(pairs)]
    path = write_lines(tmp_path / "rows.jsonl", lines)
    (divided,) = divide([tokenize_file(path, Tokenizer.load(tiny_base), max_length=64)], [0.2])
    return divided


def spec_of(work: Path, rows: tuple[TokenizedDataset, TokenizedDataset], run_id: str = "a", **own: Any) -> TrainSpec:
    paths = [work / f"{name}.npz" for name in ("train", "valid")]
    for path, dataset in zip(paths, rows, strict=True):
        dataset.save(path)
    task = TaskSpec(name="rows", train_path=str(paths[0]), valid_path=str(paths[1]))
    return TrainSpec(
        run_id=run_id,
        share_group=run_id,
        tasks=(task,),
        workdir=str(work / run_id),
        base_model="tiny",
        method=METHOD,
        method_settings=own,
    )


def run(decoder: Decoder, *specs: TrainSpec) -> list[TrainEvent]:
    training = FusedTraining(decoder)
    for spec in specs:
        training.start(spec)
    return [event for event in training if event is not None]


def finished(events: Sequence[TrainEvent], run_id: str = "a") -> FinishedEvent:
    (found,) = [event for event in events if isinstance(event, FinishedEvent) and event.run_id == run_id]
    return found


def states(base: Path, rows: TokenizedDataset, layer: int, pooling: str) -> np.ndarray:
    """Hidden states of transformers, row by row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = []
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.row(row)[0][:-1].astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.model(ids, output_hidden_states=True).hidden_states[layer][0]
        found.append((hidden[-1] if pooling == "last" else hidden.mean(0)).numpy())
    return np.stack(found)


@pytest.mark.parametrize(("layer", "pooling"), [(-1, "last"), (-2, "mean")])
def test_a_head_is_scikit_learns_on_transformers_hidden_states(
    decoder: Decoder,
    rows: tuple[TokenizedDataset, TokenizedDataset],
    tiny_base: Path,
    tmp_path: Path,
    layer: int,
    pooling: str,
) -> None:
    train, _ = rows
    own = {"head_layer": layer, "head_pooling": pooling, "inverse_regularization": 0.01}
    event = finished(run(decoder, spec_of(tmp_path, rows, **own)))
    assert event.head is not None
    assert (event.head.folds, event.head.candidates) == (0, [])  # nothing was left to choose
    assert train.labels is not None
    x, held_out = (states(tiny_base, part, layer, pooling).astype(np.float64) for part in rows)
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegression(C=0.01, tol=1e-10, max_iter=10_000).fit(scaler.transform(x), train.labels.values)
    scores = np.array(event.head.scores)
    likely = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(likely, theirs.predict_proba(scaler.transform(held_out)), atol=1e-3)


def test_the_best_candidate_is_chosen_and_stored(
    decoder: Decoder, rows: tuple[TokenizedDataset, TokenizedDataset], tiny_base: Path, tmp_path: Path
) -> None:
    events = run(decoder, spec_of(tmp_path, rows))
    event = finished(events)
    assert event.head is not None
    losses = [candidate.loss for candidate in event.head.candidates]
    assert losses == sorted(losses)
    assert len({(one.layer, one.pooling) for one in event.head.candidates}) == 2 * min(4, len(decoder.layers))
    weights = read_adapter(Path(event.path), table_rows(ModelSpec.from_directory(tiny_base)), max_rank=8)
    (head,) = weights.heads
    best = event.head.candidates[0]
    assert (head.layer, head.pooling, head.labels) == (best.layer, best.pooling, ("bad", "fair", "good"))
    assert event.valid_loss < event.base_loss
    assert [one.done for one in events if isinstance(one, ProgressEvent)][-1] == 60


def test_a_run_gives_the_same_bits_whoever_reads_beside_it(
    decoder: Decoder, rows: tuple[TokenizedDataset, TokenizedDataset], tmp_path: Path
) -> None:
    one, two = (spec_of(tmp_path, rows, run_id) for run_id in ("a", "b"))
    alone = finished(run(decoder, one))
    beside = finished(run(decoder, two, one))
    assert alone.head == beside.head
    files = [(Path(event.path) / "adapter_model.safetensors").read_bytes() for event in (alone, beside)]
    assert files[0] == files[1]


def test_a_run_that_is_stopped_ends_at_once_and_leaves_nothing(
    decoder: Decoder, rows: tuple[TokenizedDataset, TokenizedDataset], tmp_path: Path
) -> None:
    training = FusedTraining(decoder)
    training.start(spec_of(tmp_path, rows))
    events = []
    for event in training:
        if isinstance(event, ProgressEvent):
            training.stop("a", pause=False)
        events.append(event)
    assert isinstance([event for event in events if event is not None][-1], StoppedEvent)
    assert training.active == 0
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_more_rows_than_can_be_kept_are_refused_and_fewer_candidates_are_kept_before_that(
    decoder: Decoder,
    rows: tuple[TokenizedDataset, TokenizedDataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = 60 * decoder.spec.hidden_size * 4
    monkeypatch.setattr(features, "KEPT_BYTES", 2 * each)
    kept = finished(run(decoder, spec_of(tmp_path, rows))).head
    assert kept is not None
    assert {(one.layer, one.pooling) for one in kept.candidates} == {(-1, "last"), (-1, "mean")}
    monkeypatch.setattr(features, "KEPT_BYTES", each - 1)
    (failed,) = run(decoder, spec_of(tmp_path, rows))
    assert isinstance(failed, FailedEvent)
    assert failed.code == "too_many_rows"
    assert "give fewer rows" in failed.message
