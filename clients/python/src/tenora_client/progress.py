"""Progress in a terminal: a bar on stderr that redraws itself, or now and then a line where there is no terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO

from tenora_client.calls import OnBytes
from tenora_client.job_parts import Trial
from tenora_client.models import JobEvent, JobState

WIDTH = 24
Clock = Callable[[], float]


class Bar:
    """One line of progress: `label [####----] 12/36  text`.

    On a terminal the line is redrawn in place. Elsewhere (a log, a pipe) a line is written at each tenth.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._tenth = -1
        self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def draw(self, done: float, total: float, text: str = "") -> None:
        """Show `done` of `total`; a `total` of 0 means unknown and shows the text alone."""
        fraction = min(1.0, done / total) if total > 0 else 0.0
        if self._live:
            filled = round(WIDTH * fraction)
            bar = f"[{'#' * filled}{'-' * (WIDTH - filled)}] " if total > 0 else ""
            line = f"{self._label} {bar}{text}".rstrip()
            self._write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K")
            self._drawn = True
        elif int(fraction * 10) != self._tenth:
            self._tenth = int(fraction * 10)
            share = f"{fraction:4.0%}  " if total > 0 else ""
            self._write(f"{self._label} {share}{text}".rstrip() + "\n")

    def line(self, text: str) -> None:
        """Write a line that stays, above the bar."""
        width = shutil.get_terminal_size(fallback=(100, 24)).columns
        text = textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        self._write(f"\r\x1b[K{text}\n" if self._drawn else f"{text}\n")
        self._drawn = False

    def close(self) -> None:
        """End the bar's line; the last state stays visible."""
        if self._drawn:
            self._write("\n")
            self._drawn = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextmanager
def transfer(progress: bool | OnBytes, label: str) -> Iterator[OnBytes | None]:
    """The callback for a transfer: the caller's own, a bar's (True) or none (False)."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    with Bar(label) as bar:
        yield lambda done, total: bar.draw(done, total, f"{_size(done)} of {_size(total)}" if total else _size(done))


class JobBar:
    """Draws a fine-tuning job from its states and its events: step, losses, tokens per second, time left."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._bar = Bar("training", stream)
        self._clock = clock
        self._first: tuple[float, float] | None = None  # (step, time) of the first step that we saw
        self._seen: dict[str, float] = {}
        self._folds: float | None = None  # share of a cross-validation that is done
        self._status = ""

    def show(self, job: JobState, events: Sequence[JobEvent]) -> None:
        """Draw the job's state; `events` are the new ones, oldest first."""
        for event in events:
            if event.level != "info":
                self._bar.line(f"{event.level}: {event.message}")
            self._note(event.data or {})
        step, total = self._seen.get("step", 0.0), self._seen.get("total_steps", 0.0)
        if job.status == "succeeded" and total:
            self._seen["step"] = step = total
        if job.status == "running" and job.sweep_results:
            self._bar.draw(*_sweep(job.sweep_results))
        elif job.status == "running" and total:
            self._bar.draw(step, total, self._figures(step, total))
        elif job.status == "running" and self._folds is not None:
            self._bar.draw(self._folds, 1.0, f"cross-validation {self._folds:.0%}")
        elif job.status != self._status or job.finished:
            self._bar.draw(
                step, total, f"{job.status.replace('_', ' ')}  {self._figures(step, total) if total else ''}"
            )
        self._status = job.status

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()

    def _note(self, metrics: Mapping[str, Any]) -> None:
        if "trial" in metrics:  # its steps are not the job's; the job's own table tells where the sweep stands
            return
        if "folds_done" in metrics:
            self._folds = float(metrics["folds_done"])
        for key in ("step", "total_steps", "train_loss", "valid_loss", "base_loss", "tokens_per_second"):
            value = metrics.get(key)
            if isinstance(value, (int, float)):
                self._seen[key] = float(value)
        if self._first is None and self._seen.get("step", 0.0) > 0:
            self._first = (self._seen["step"], self._clock())

    def _figures(self, step: float, total: float) -> str:
        parts = [f"step {step:.0f}/{total:.0f}"]
        for key, form in (
            ("train_loss", "loss {:.3f}"),
            ("valid_loss", "held-out {:.3f}"),
            ("tokens_per_second", "{:.0f} tok/s"),
        ):
            if key in self._seen:
                parts.append(form.format(self._seen[key]))
        left = self._seconds_left(step, total)
        if left is not None:
            parts.append(f"ETA {duration(left)}")
        return "  ".join(parts)

    def _seconds_left(self, step: float, total: float) -> float | None:
        """Steps to go at the pace since the first step that we saw; None before there is a pace."""
        if self._first is None or step <= self._first[0] or step >= total:
            return None
        first_step, first_time = self._first
        return (total - step) * (self._clock() - first_time) / (step - first_step)


def _sweep(trials: Sequence[Trial]) -> tuple[float, float, str]:
    """Trials that are over, all trials, and the best one so far in words."""
    over = sum(trial.status not in ("queued", "running") for trial in trials)
    losses = [trial.valid_loss for trial in trials if trial.valid_loss is not None]
    best = f"  best held-out {min(losses):.3f}" if losses else ""
    return over, len(trials), f"trials {over}/{len(trials)} over{best}"


def duration(seconds: float) -> str:
    """`1:05` or `2:03:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
