"""A few steps on the real base and real rows: the base's loss is transformers' own, and training lowers it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from tenora.model.loading import load_decoder
from tenora.model.tokenizer import Tokenizer
from tenora.training.dataset import TokenizedDataset, tokenize_file
from tenora.training.spec import EvalEvent, FinishedEvent, TaskSpec, TrainSpec

from .runs import TrainingRun

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Overrides the room's fixture: the real model wants all the cores."""


def take(source: Path, rows: int, target: Path) -> Path:
    with source.open("rb") as file:
        target.write_bytes(b"".join(file.readline() for _ in range(rows)))
    return target


def transformers_loss(directory: Path, dataset: TokenizedDataset) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = 0.0
    for row in range(len(dataset)):
        tokens, weights = dataset.row(row)
        ids, learned = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(weights[1:].astype(bool))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1][learned]
        total += float(F.cross_entropy(logits, ids[1:][learned], reduction="sum"))
    return total / dataset.num_trained


def test_a_slice_of_pubmedqa(real_base: Path, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(real_base)
    for part, rows in (("train", 16), ("valid", 6)):
        path = take(shared_data / f"pubmedqa_sft_{part}.jsonl", rows, tmp_path / f"{part}.jsonl")
        tokenize_file(path, tokenizer, max_length=1024).save(tmp_path / f"{part}.npz")
    valid = TokenizedDataset.load(tmp_path / "valid.npz")
    spec = TrainSpec(
        run_id="real",
        group="",
        tasks=(TaskSpec(name="rows", train_path=str(tmp_path / "train.npz"), valid_path=str(tmp_path / "valid.npz")),),
        workdir=str(tmp_path / "work"),
        base_model="smollm2-135m",
        n_epochs=1,
    )
    decoder = load_decoder(real_base, device=torch.device("cpu"), dtype=torch.float32)
    events = [item for item in TrainingRun(decoder, spec) if item is not None]
    first, finished = events[0], events[-1]
    assert isinstance(first, EvalEvent)
    assert isinstance(finished, FinishedEvent)
    assert first.base_loss == pytest.approx(transformers_loss(real_base, valid), rel=1e-4)
    assert finished.valid_loss < first.base_loss - 0.03
