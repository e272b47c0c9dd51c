"""What a large upload costs the streams beside it: `python -m tests.bench.preparation --model DIR`.

Streams decode without pause. Gaps between their tokens are measured while nothing else happens, while a file of many
rows is sent and checked, and while a job on it is prepared, each for `--longest` seconds at most; what overlaps
training is left out. Prints a report as JSON: the p95 while preparing is to be at most 1.2 times the idle one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tenora.cli.bench.figures import head, median, spread
from tests.bench.serving.fixture import Base, Served, default_threads, end_in_order, serve
from tests.bench.serving.quiet import NOISY, Quiet
from tests.bench.training.__main__ import DATA

HERE = Path(__file__).parents[2]
PREPARING = "validating_files"
POLL = 0.5  # seconds between two looks at the job
SEND = """
import sys
from pathlib import Path
from tenora_client import Client
url, key, path = sys.argv[1:]
print(Client(url, key, timeout=3600.0).files.upload(Path(path)).id)
"""


def write_rows(path: Path, count: int) -> None:
    """So many short conversations of words from the shipped data: 8 to 20 asked, 15 to 40 answered; always the same."""
    words = sorted({word for file in DATA.glob("*.jsonl") for word in file.read_text(encoding="utf-8").split()})
    words = [word for word in words if word.isalpha()]
    draw = random.Random(17)

    def said(role: str, least: int, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(least, most)))}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"messages": [said("user", 8, 20), said("assistant", 15, 40)]}) + "\n")


class Rounds:
    """Rounds of `streams` streams of `tokens` tokens each, one round after the other."""

    def __init__(self, served: Served, streams: int, tokens: int, longest: float | None) -> None:
        self._served = served
        self._streams = streams
        self._tokens = tokens
        self._longest = math.inf if longest is None else longest

    def idle(self, seconds: float) -> list[float]:
        """Seconds between tokens, of whole rounds over at least so long."""
        ends = time.monotonic() + seconds
        found: list[float] = []
        while time.monotonic() < ends:
            found += self._round()
        return found

    def beside(self, goes_on: Callable[[], bool]) -> list[float]:
        """The same, of the rounds that ended while `goes_on` was true; no round begins after `longest` seconds."""
        ends = time.monotonic() + self._longest
        found: list[float] = []
        while goes_on() and time.monotonic() < ends:
            gaps = self._round()
            if goes_on():
                found += gaps
        return found

    def _round(self) -> list[float]:
        load = self._served.load([None] * self._streams, streams=self._streams, output_tokens=self._tokens)
        return [gap for sample in load.good for gap in sample.gaps]


class Preparing:
    """A job from its creation until its rows are prepared; watched from a thread.

    Attributes:
        seconds: how long that took; None if it was cancelled before.
    """

    def __init__(self, served: Served, file: str) -> None:
        self.seconds: float | None = None
        self._jobs = served.client.jobs
        self._began = time.monotonic()
        self._id = self._jobs.create(file, name="beside").id
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def goes_on(self) -> bool:
        """Whether rows are still being prepared."""
        return not self._ended.is_set()

    def end(self) -> None:
        """Cancel the job, whether it trains by now or not, and wait until it has ended."""
        self._jobs.cancel(self._id)
        self._watch.join()
        while self._jobs.get(self._id).status not in {"cancelled", "failed", "succeeded"}:
            time.sleep(POLL)

    def _look(self) -> None:
        while (status := self._jobs.get(self._id).status) == PREPARING:
            time.sleep(POLL)
        if status != "cancelled":
            self.seconds = time.monotonic() - self._began
        self._ended.set()


@contextlib.contextmanager
def sending(served: Served, path: Path) -> Iterator[subprocess.Popen[str]]:
    """The upload, by a process of its own: the load generator must not wait for it."""
    command = [sys.executable, "-c", SEND, served.server.url, served.server.key(), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def measure(
    served: Served, rows: Path, *, streams: int, tokens: int, seconds: float, longest: float | None
) -> dict[str, Any]:
    """One round of phases: idle, sent and checked, idle, prepared. Gaps in milliseconds, ratios of their p95."""
    rounds = Rounds(served, streams, tokens, longest)
    with Quiet() as quiet:
        idle = rounds.idle(seconds)
        began = time.monotonic()
        with sending(served, rows) as child:
            checked = rounds.beside(lambda: child.poll() is None)
            file = (child.communicate()[0] or "").strip()
        sent_seconds = time.monotonic() - began
        if not file:
            raise RuntimeError("the file was not taken")
        idle += rounds.idle(seconds)
        job = Preparing(served, file)
        prepared = rounds.beside(job.goes_on)
        job.end()
    served.client.files.delete(file)
    found = {
        name: spread(gaps, scale=1e3) for name, gaps in (("idle", idle), ("checked", checked), ("prepared", prepared))
    }
    if not prepared:
        raise RuntimeError("the rows were prepared before a round had ended: take more rows, or fewer tokens")
    return {
        "p95_ratio": found["prepared"]["p95"] / found["idle"]["p95"],  # type: ignore[operator]  # there are gaps
        "median_ratio": found["prepared"]["p50"] / found["idle"]["p50"],  # type: ignore[operator]
        "p95_ratio_checked": found["checked"]["p95"] / found["idle"]["p95"] if checked else None,  # type: ignore[operator]
        "preparation_seconds": job.seconds,
        "sent_and_checked_seconds": sent_seconds,
        "gaps_ms": found,
        "foreign_cores": quiet.foreign,
        "noisy": quiet.foreign > NOISY,
    }


def commit() -> str:
    """Of this checkout, with `-dirty` where it has changes."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.preparation", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream in a round")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each idle window, two a repeat")
    parser.add_argument("--longest", type=float, help="seconds that are measured of each other phase; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    end_in_order()
    windows = {name: getattr(options, name) for name in ("streams", "tokens", "seconds", "longest")}
    shown = {**windows, **{name: getattr(options, name) for name in ("rows", "repeats", "threads")}}
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tenora-bench-")))
        rows = work / "rows.jsonl"
        write_rows(rows, options.rows)
        served = serve(stack, Base.of(options.model), work / "home", options.threads)
        served.warm([None] * options.streams)
        runs = [measure(served, rows, **windows) for _ in range(options.repeats)]
    middle = {name: median([run[name] for run in runs]) for name in ("p95_ratio", "median_ratio")}
    shown |= {"model": options.model.name}
    print(json.dumps({**head("preparation", shown), "commit": commit(), "median": middle, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
