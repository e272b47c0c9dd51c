"""How long a start takes: `python -m tests.bench.starting --model DIR [--against CHECKOUT]`.

Seconds from the command to `/readyz`, and to the worker's word that it is at work, where there is one; medians over
starts on one state directory, of two checkouts in turn. The first start, which compiles and converts, does not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tenora.cli.bench.figures import head, median
from tests.bench.checkouts.__main__ import HERE, paths
from tests.bench.serving.fixture import default_threads, end_in_order
from tests.bench.serving.quiet import Quiet
from tests.e2e.serving import Server, until

POLL = 0.01
AT_WORK = "the worker is at work"


def start(server: Server) -> dict[str, float]:
    """One start, and the end of it."""
    server.log.unlink(missing_ok=True)
    began = time.monotonic()
    server.launch()
    try:
        until(lambda: server.process.poll() is not None or server.ready(), "ready", poll=POLL)
        if server.process.poll() is not None:
            raise RuntimeError(server.tail())
        found = {"ready": time.monotonic() - began}
        if server._has_child("tenora.cli.working"):
            until(lambda: AT_WORK in server.log.read_text(), AT_WORK, poll=POLL)
            found["worker"] = time.monotonic() - began
    finally:
        server.stop()
    return found


def main() -> None:
    """Print the report as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.starting", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    end_in_order()
    checkouts = {"this": HERE} | ({} if options.against is None else {"other": options.against.resolve()})
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="tenora-bench-") as home, Quiet() as quiet:
        for number in range(options.repeats + 1):
            for name, checkout in checkouts.items():
                place = Path(home) / name
                place.mkdir(exist_ok=True)
                settings = {"TENORA_THREADS": str(options.threads), "PYTHONPATH": paths(checkout)}
                found = start(Server(place, options.model, **settings))
                if number:
                    taken[name].append(found)
    medians = {
        name: {what: median([one[what] for one in starts]) for what in starts[0]} for name, starts in taken.items()
    }
    shown = {"model": options.model.name, "repeats": options.repeats, "threads": options.threads}
    report = {**head("starting", shown), "median_seconds": medians, "starts": taken, "foreign_cores": quiet.foreign}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
