"""Specs of small runs, and what is compared of their events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from tenora.model.decoder import Decoder
from tenora.training.events import CheckpointEvent, FailedEvent, FinishedEvent, StepEvent, TrainEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tests.data.rows import random_rows

MakeSpec = Callable[..., TrainSpec]


def default_spec(directory: Path, workdir: str, **changes: Any) -> TrainSpec:
    """14 rows, 4 steps an epoch, 2 epochs."""
    settings = {
        "run_id": "run-1",
        "share_group": "g",
        "tasks": (
            TaskSpec(name="rows", train_path=str(directory / "train.npz"), valid_path=str(directory / "valid.npz")),
        ),
        "workdir": str(directory / workdir),
        "base_model": "tiny",
        "lora": LoraSpec(rank=4, alpha=8.0, dropout=0.1),
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "tokens_per_microbatch": 40,
        "seed": 11,
    }
    return TrainSpec(**{**settings, **changes})


def write_rows(directory: Path) -> None:
    random_rows(14, seed=1).save(directory / "train.npz")
    random_rows(5, seed=2).save(directory / "valid.npz")


class TrainingRun:
    """One run by itself: iterate it for its events, with None at every layer boundary.

    If `spec.workdir` holds the state of an earlier run with this spec, iterating goes on from there.
    """

    def __init__(self, decoder: Decoder, spec: TrainSpec) -> None:
        self._training = FusedTraining(decoder)
        self._run_id = spec.run_id
        self._training.start(spec)

    def stop(self, *, pause: bool) -> None:
        """End the run; its last item is then a StoppedEvent. See `JobRun.stop`."""
        self._training.stop(self._run_id, pause=pause)

    def __iter__(self) -> Iterator[TrainEvent | None]:
        return iter(self._training)

    @property
    def passed_tokens(self) -> int:
        """Learned tokens that had a gradient, as the queue counts them, whatever learner they were of."""
        return self._training.trained_tokens


Items = list[TrainEvent | None]


def events_of(items: Iterable[TrainEvent | None]) -> list[TrainEvent]:
    return [item for item in items if item is not None]


def comparable(events: list[TrainEvent]) -> list[TrainEvent]:
    """Without what clocks and directories decide."""
    found: list[TrainEvent] = []
    for event in events:
        if isinstance(event, StepEvent):
            found.append(msgspec.structs.replace(event, tokens_per_second=0.0))
        elif isinstance(event, CheckpointEvent):
            found.append(msgspec.structs.replace(event, path=Path(event.path).name))
        elif isinstance(event, FinishedEvent):
            found.append(msgspec.structs.replace(event, path=Path(event.path).name, seconds=0.0, probe=None))
        else:
            found.append(event)
    return found


def weights_of(event: TrainEvent) -> dict[str, torch.Tensor]:
    assert isinstance(event, FinishedEvent), event
    return load_file(Path(event.path) / "adapter_model.safetensors")


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def failure(run: TrainingRun) -> FailedEvent:
    failed = events_of(run)[-1]
    assert isinstance(failed, FailedEvent), failed
    return failed
