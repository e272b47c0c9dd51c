"""A few steps on the real base and real rows: the base's loss is transformers' own, and training lowers it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from tenora.data.dataset import TokenizedDataset, tokenize_file
from tenora.engine.client.child import available_cpus
from tenora.model.loading import load_decoder
from tenora.model.tokenizer import Tokenizer
from tenora.training.events import EvalEvent, FinishedEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tenora_kernels.cpu.runtime.team import Team

from .runs import TrainingRun, assert_same_bits, weights_of

pytestmark = [pytest.mark.real, pytest.mark.full]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Overrides the room's fixture: the real model wants all the cores."""


SHAPES = [
    LoraSpec(rank=4, alpha=8.0),
    LoraSpec(rank=16, alpha=32.0),
    LoraSpec(rank=1, alpha=2.0, target_modules=("q_proj", "v_proj")),
    LoraSpec(rank=8, alpha=8.0, use_rslora=True, target_modules=("o_proj", "up_proj", "down_proj")),
    LoraSpec(rank=33, alpha=8.0, target_modules=("gate_proj",)),
    LoraSpec(rank=64, alpha=64.0),
]


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
        tokenize_file(path, tokenizer, max_length=512).save(tmp_path / f"{part}.npz")
    valid = TokenizedDataset.load(tmp_path / "valid.npz")
    spec = TrainSpec(
        run_id="real",
        share_group="",
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


@pytest.mark.full
def test_adapters_of_a_mixed_batch_have_the_bits_that_they_would_get_alone(
    real_base: Path, shared_data: Path, tmp_path: Path
) -> None:
    """Six tenants' jobs of other ranks and modules on the packed base, as it is served: the tolerance is 0."""
    whole = take(shared_data / "pubmedqa_sft_train.jsonl", 13, tmp_path / "rows.jsonl")
    rows = tokenize_file(whole, Tokenizer.load(real_base), max_length=1024)
    rows.select(np.array([12])).save(tmp_path / "valid.npz")
    decoder = load_decoder(
        real_base, device=torch.device("cpu"), dtype=torch.float32, team=Team.shared(available_cpus())
    )
    specs = []
    for number, shape in enumerate(SHAPES):
        path = tmp_path / f"train-{number}.npz"
        rows.select(np.arange(2 * number, 2 * number + 2)).save(path)
        task = TaskSpec(name="rows", train_path=str(path), valid_path=str(tmp_path / "valid.npz"))
        specs.append(
            TrainSpec(
                run_id=f"run-{number}",
                share_group=f"tenant-{number}",
                tasks=(task,),
                workdir=str(tmp_path / f"run-{number}"),
                base_model="smollm2-135m",
                n_epochs=1,
                batch_size=2,
                lora=shape,
            )
        )
    training, mixed = FusedTraining(decoder), {}
    for spec in specs:
        training.start(spec)
    for event in training:
        if isinstance(event, FinishedEvent):
            mixed[event.run_id] = weights_of(event)
    for number, spec in enumerate(specs[1:3]):
        alone = list(TrainingRun(decoder, msgspec.structs.replace(spec, workdir=str(tmp_path / f"alone-{number}"))))
        theirs = weights_of(alone[-1])
        assert any(tensor.any() for name, tensor in theirs.items() if "lora_B" in name)
        assert_same_bits(mixed[spec.run_id], theirs)
