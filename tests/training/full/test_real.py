"""One step of the real base on real rows: transformers' loss and weights, in the memory that admission counts on."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from tenora.config import Settings
from tenora.data.dataset import tokenize_file
from tenora.data.rows import ANSWERS
from tenora.engine.apart import ApartTrainer
from tenora.model.spec import ModelSpec
from tenora.model.tokenizer import Tokenizer
from tenora.training.events import FinishedEvent, StepEvent, TrainEvent
from tenora.training.full.selection import Selection, needed_bytes
from tenora.training.plans.single import load_corpus
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tests.training.test_real import take

from .runs import SETTINGS, oracle

pytestmark = [pytest.mark.real, pytest.mark.full]


@pytest.fixture
def spec(real_base: Path, shared_data: Path, tmp_path: Path) -> TrainSpec:
    """400 rows in batches of 8, one step."""
    tokenizer = Tokenizer.load(real_base)
    for name, rows in (("train", 400), ("valid", 2)):
        lines = take(shared_data / f"pubmedqa_sft_{name}.jsonl", rows, tmp_path / f"{name}.jsonl")
        tokenize_file(lines, tokenizer, max_length=2048, kind=ANSWERS).save(tmp_path / f"{name}.npz")
    task = TaskSpec(name="rows", train_path=str(tmp_path / "train.npz"), valid_path=str(tmp_path / "valid.npz"))
    return TrainSpec(
        run_id="real",
        share_group="g",
        tasks=(task,),
        workdir=str(tmp_path / "work"),
        base_model="smollm2-135m",
        method="full",
        method_settings=SETTINGS,
        lora=LoraSpec(),
        max_steps=1,
        batch_size=8,
        learning_rate=5e-5,
        scheduler="constant",
        warmup_ratio=0.0,
    )


async def followed(base: Path, home: Path, spec: TrainSpec) -> tuple[list[TrainEvent], int]:
    """The events of a run in its own process, and the most memory that it had of its own, in bytes.

    Pages of files that are written or read do not count: the kernel takes them back where memory is short.
    """
    trainer, peak = ApartTrainer(Settings(home=home), base), 0
    over = asyncio.Event()

    async def watch() -> None:
        nonlocal peak
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = Path(f"/proc/{trainer.pid}/status").read_text()  # noqa: ASYNC240
                found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
                peak = max([peak, *(int(line.split()[1]) * 1024 for line in found)])
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    events = [event async for event in trainer.train(spec)]
    over.set()
    await watching
    print(f"{peak:,} bytes at most")
    return events, peak


async def test_a_step_is_transformers_and_takes_the_memory_that_was_promised(
    real_base: Path, tmp_path: Path, spec: TrainSpec
) -> None:
    events, peak = await followed(real_base, tmp_path, spec)
    step = next(event for event in events if isinstance(event, StepEvent))
    corpus = load_corpus(spec)
    loss, norm, expected = oracle(
        real_base,
        corpus.train,
        corpus.batch(0, 8, seed=spec.seed),
        lambda name: "proj" in name,
        rate=step.learning_rate,
        max_grad_norm=spec.max_grad_norm,
        weight_decay=0.0,
    )
    assert (step.train_loss, step.grad_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    finished = events[-1]
    assert isinstance(finished, FinishedEvent), finished
    assert finished.full is not None
    found = load_file(Path(finished.full.path) / "model.safetensors")
    differences = torch.cat([(found[name] - expected[name]).abs().flatten() for name in found])
    # Adam's first step is the rate times the gradient's sign, and of a few gradients float32 does not know it.
    beyond = float((differences > 1e-5).double().mean())
    print(f"{beyond:.2e} of the weights differ by more than 1e-5, {float(differences.max()):.2e} at most")
    assert beyond <= 1e-4
    assert float(differences.max()) <= 2.001 * step.learning_rate
    model = ModelSpec.from_directory(real_base)
    assert peak <= needed_bytes(model, Selection.of(SETTINGS, model), 2048)


async def test_with_the_embeddings_it_takes_no_more_than_was_promised_either(
    real_base: Path, tmp_path: Path, spec: TrainSpec
) -> None:
    own = {**SETTINGS, "embeddings": True, "norms": True}
    _, peak = await followed(real_base, tmp_path, msgspec.structs.replace(spec, method_settings=own))
    model = ModelSpec.from_directory(real_base)
    assert peak <= needed_bytes(model, Selection.of(own, model), 2048)
