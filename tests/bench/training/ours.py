"""Our training in this process: what the engine hosts, without the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tenora.engine.client.child import available_cpus
from tenora.model.decoder import Decoder
from tenora.model.executors import kernels
from tenora.model.loading import load_decoder, resolve_dtype
from tenora.training.events import EvalEvent, FailedEvent, FinishedEvent, StepEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import TaskSpec, TrainSpec
from tenora_kernels.cpu.runtime.team import Team


@dataclass(slots=True)
class Trained:
    """What runs that began together took.

    Attributes:
        seconds: wall time from the start of the first to the end of the last, evaluations included.
        stepping: of it, without evaluations; only for one run.
        finished: by run.
        losses: held-out loss of the base and after each evaluation, by run.
        tokens_per_second: of each step, by run.
    """

    seconds: float = 0.0
    stepping: float = 0.0
    finished: dict[str, FinishedEvent] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    tokens_per_second: dict[str, list[float]] = field(default_factory=dict)


def load(base: Path, threads: int) -> Decoder:
    """The base as `tenora serve` loads it."""
    threads = threads or available_cpus()
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    decoder = load_decoder(base, device=cpu, dtype=resolve_dtype("auto", cpu), team=Team.shared(threads))
    kernels.warm_up(decoder, train=True)
    return decoder


def spec(name: str, train: Path, valid: Path, work: Path, **settings: Any) -> TrainSpec:
    """A run with the defaults of a job, but for what is named."""
    task = TaskSpec(name="rows", train_path=str(train), valid_path=str(valid))
    return TrainSpec(
        run_id=name, share_group=name, tasks=(task,), workdir=str(work / name), base_model="base", **settings
    )


def train(decoder: Decoder, specs: list[TrainSpec]) -> Trained:
    """Run them together.

    Raises:
        RuntimeError: if one fails.
    """
    training, found = FusedTraining(decoder), Trained()
    for one in specs:
        training.start(one)
    started = last = time.perf_counter()
    for event in training:
        now = time.perf_counter()
        match event:
            case StepEvent():
                found.stepping += now - last
                found.tokens_per_second.setdefault(event.run_id, []).append(event.tokens_per_second)
            case EvalEvent():
                found.losses.setdefault(event.run_id, []).append(event.valid_loss)
            case FinishedEvent():
                found.finished[event.run_id] = event
            case FailedEvent():
                raise RuntimeError(event.message)
        if event is not None:
            last = now
    found.seconds = time.perf_counter() - started
    return found
