"""Training on a real GPU follows the CPU's: the same losses, step by step, and the same adapter at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenora.model.loading import load_decoder
from tenora.training.events import StepEvent, TrainEvent
from tenora.training.spec import LoraSpec

from .runs import MakeSpec, TrainingRun, events_of, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def losses(events: list[TrainEvent]) -> list[float]:
    return [event.train_loss for event in events if isinstance(event, StepEvent)]


def test_float32_follows_the_cpu(tiny_base: Path, make_spec: MakeSpec) -> None:
    runs = {}
    for device in ("cpu", "cuda"):
        spec = make_spec(lora=LoraSpec(rank=4, alpha=8.0, dropout=0.0))
        runs[device] = events_of(TrainingRun(load_decoder(tiny_base, device=device), spec))
    assert losses(runs["cuda"]) == pytest.approx(losses(runs["cpu"]), rel=1e-4)
    wanted, found = weights_of(runs["cpu"][-1]), weights_of(runs["cuda"][-1])
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=2e-2)


def test_bfloat16_learns(tiny_base: Path, make_spec: MakeSpec) -> None:
    base = load_decoder(tiny_base, device="cuda", dtype=torch.bfloat16)
    found = losses(events_of(TrainingRun(base, make_spec(n_epochs=6))))
    assert found[-1] < found[0]
