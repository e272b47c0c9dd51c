"""Events of a run as lines of a job's log, and the log's numbers as a CSV file."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tenora.training.spec import EvalEvent, FinishedEvent, StepEvent

CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_CSV_SOURCES = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
Metrics = dict[str, float | int | None]


@dataclass(slots=True)
class Pace:
    """When the run will end, from the steps seen since it was started or resumed."""

    first_step: int | None = None
    total_steps: int = 0
    started: float = field(default_factory=time.monotonic)

    def estimate(self, event: StepEvent) -> int | None:
        """Unix time of the end; None until two steps were seen."""
        self.total_steps = event.total_steps
        if self.first_step is None:
            self.first_step, self.started = event.step, time.monotonic()
            return None
        per_step = (time.monotonic() - self.started) / max(event.step - self.first_step, 1)
        return int(time.time() + per_step * (event.total_steps - event.step))


def step_line(event: StepEvent) -> tuple[str, Metrics]:
    """Message and numbers of an optimizer step."""
    return f"Step {event.step}/{event.total_steps}: training loss={event.train_loss:.2f}", {
        "step": event.step,
        "total_steps": event.total_steps,
        "epoch": event.epoch,
        "train_loss": event.train_loss,
        "train_mean_token_accuracy": event.train_accuracy,
        "learning_rate": event.learning_rate,
        "grad_norm": event.grad_norm,
        "trained_tokens": event.trained_tokens,
        "tokens_per_second": event.tokens_per_second,
    }


def eval_line(event: EvalEvent, total_steps: int) -> tuple[str, Metrics]:
    """Message and numbers of an evaluation. Every evaluation covers all held-out rows, so the `full_` numbers agree."""
    where = f"Step {event.step}/{total_steps}" if total_steps else f"Step {event.step}"
    return f"{where}: validation loss={event.valid_loss:.2f} (base {event.base_loss:.2f})", {
        "step": event.step,
        "total_steps": total_steps or None,
        "valid_loss": event.valid_loss,
        "valid_mean_token_accuracy": event.valid_accuracy,
        "full_valid_loss": event.valid_loss,
        "full_valid_mean_token_accuracy": event.valid_accuracy,
        "base_loss": event.base_loss,
        "best": int(event.best),
    }


def evaluation_of(event: FinishedEvent) -> Metrics:
    """What a finished run says about its adapter."""
    return {
        "valid_loss": event.valid_loss,
        "valid_accuracy": event.valid_accuracy,
        "base_loss": event.base_loss,
        "best_step": event.step,
        "steps": event.steps,
        "trained_tokens": event.trained_tokens,
        "seconds": event.seconds,
    }


def metrics_csv(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """The numbers of a log, oldest first, as a CSV file with a row per step.

    A step that was done again after a crash appears once, with its last numbers.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line.get("step") is not None:
            row = by_step.setdefault(int(line["step"]), {})
            row.update({name: line[name] for name in _CSV_SOURCES if line.get(name) is not None})
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for step, row in sorted(by_step.items()):
        writer.writerow([step, *(row.get(name, "") for name in _CSV_SOURCES)])
    return out.getvalue().encode()
