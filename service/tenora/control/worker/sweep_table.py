"""The table of a sweep in its job's row: what each trial came to, and which one won."""

from __future__ import annotations

from tenora.control.jobs.rows import finite
from tenora.control.registry.tables import JobRow
from tenora.training.events import TrialEvent
from tenora.training.methods.table import find_method
from tenora.training.settings import SETTINGS
from tenora.training.spec import LORA, TRIAL


def record_trial(row: JobRow, event: TrialEvent) -> None:
    """Put where a trial stands into the table. A state that is told again after a crash changes nothing."""
    # A fresh list: the column is written only if its value is another object.
    row.sweep_results = [
        {
            **trial,
            "status": event.status,
            "step": event.step,
            "total_steps": event.total_steps,
            "valid_loss": finite(event.valid_loss),
            "reason": event.reason or None,
        }
        if trial["trial"] == event.trial
        else trial
        for trial in row.sweep_results or []
    ]


def shares_done(row: JobRow) -> dict[int, float]:
    """Which share of its schedule each trial has done."""
    return {trial["trial"]: trial["step"] / trial["total_steps"] for trial in row.sweep_results or [] if trial["step"]}


def choose_winner(row: JobRow, winner: int) -> None:
    """Mark the winner; its settings become the job's."""
    row.sweep_results = [{**trial, "winner": trial["trial"] == winner} for trial in row.sweep_results or []]
    (trial,) = (trial for trial in row.sweep_results if trial["winner"])
    multiplier = trial["learning_rate"] / find_method(row.requested["method"]).learning_rate
    chosen = {name: trial[name] for name in TRIAL if name in trial} | {"learning_rate_multiplier": multiplier}
    row.hyperparameters = {name: chosen.get(name, value) for name, value in row.hyperparameters.items()}
    row.lora = row.lora | {name: value for name, value in chosen.items() if name in LORA}
    row.settings = row.settings | {name: value for name, value in chosen.items() if name in SETTINGS}
