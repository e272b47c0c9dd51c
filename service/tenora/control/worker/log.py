"""Events of a run as lines of a job's log, and the log's numbers as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from tenora.training.events import EvalEvent, FinishedEvent, FoldEvent, ProgressEvent, StepEvent, TrialEvent

CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_CSV_SOURCES = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
_TASK = "valid_loss/"  # and the name of a task: its held-out loss
Metrics = dict[str, float | int | str | None]


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
        **event.metrics,
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
        **({} if event.general_loss is None else {"general_loss": event.general_loss}),
        **{f"{_TASK}{name}": loss for name, loss in event.tasks.items()},
        **event.metrics,
    }


def trial_line(event: TrialEvent, trials: int) -> tuple[str, Metrics]:
    """Message and numbers of a trial of a sweep; `trial` counts from 0, as in the job's `sweep_results`."""
    where = f"Trial {event.trial + 1} of {trials}, step {event.step}/{event.total_steps}"
    loss = "" if event.valid_loss is None else f": best validation loss={event.valid_loss:.3f}"
    said = {
        "running": "",
        "stopped": "; stopped, others are better",
        "finished": "; finished",
        "failed": f"; failed: {event.reason}",
    }[event.status]
    return f"{where}{loss}{said}", {
        "trial": event.trial,
        "status": event.status,
        "step": event.step,
        "total_steps": event.total_steps,
        "valid_loss": event.valid_loss,
        "trained_tokens": event.trained_tokens,
    }


def fold_line(event: FoldEvent, folds: int) -> tuple[str, Metrics]:
    """Message and numbers of a fold of a cross-validation; `fold` counts from 0.

    Its steps are not the job's, so they have names of their own: `step` is that of the fit on all rows.
    """
    over = event.step == event.total_steps
    where = f"Fold {event.fold + 1}/{folds}" + ("" if over else f", step {event.step}/{event.total_steps}")
    return f"{where}: validation loss={event.valid_loss:.2f} (base {event.base_loss:.2f})", {
        "fold": event.fold,
        "fold_step": event.step,
        "fold_total_steps": event.total_steps,
        "fold_valid_loss": event.valid_loss,
        "fold_base_loss": event.base_loss,
        "folds_done": event.done,
        "trained_tokens": event.trained_tokens,
    }


def progress_line(event: ProgressEvent) -> tuple[str, Metrics]:
    """Message and numbers of a run that takes no steps."""
    return f"{event.what}: {event.done} of {event.total}", {"done": event.done, "total": event.total}


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


def metrics_csv(lines: Iterable[Mapping[str, Any]], *, winner: int | None = None, metrics: Iterable[str] = ()) -> bytes:
    """The numbers of a log, oldest first, as a CSV file with a row per step.

    Columns are OpenAI's, then one per task, then of each of the method's `metrics` that of the step and that of the
    held-out rows. A step that was done again after a crash appears once, with its last numbers. Of a sweep's trials
    only the winner's count, of a cross-validation the fit on all rows and the losses of all folds together.
    """
    by_step: dict[int, dict[str, Any]] = {}
    own = tuple(metrics)
    of_method = [f"{side}_{name}" for name in own for side in ("train", "valid")]
    tasks: dict[str, None] = {}
    for line in lines:
        if line.get("step") is None or line.get("trial", winner) != winner:
            continue
        found = [name for name in line if name.startswith(_TASK)]
        tasks.update(dict.fromkeys(found))
        row = by_step.setdefault(int(line["step"]), {})
        row.update({name: line[name] for name in (*_CSV_SOURCES, *found) if line.get(name) is not None})
        side = "train" if "train_loss" in line else "valid"
        row.update({f"{side}_{name}": line[name] for name in own if line.get(name) is not None})
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*CSV_COLUMNS, *tasks, *of_method))
    for step, row in sorted(by_step.items()):
        writer.writerow([step, *(row.get(name, "") for name in (*_CSV_SOURCES, *tasks, *of_method))])
    return out.getvalue().encode()
