"""CPU time of the host beside the model: `python -m tests.bench.host [CASE …] [--against CHECKOUT]`.

Medians of one thread's CPU time; loads of adapters, which take two threads, in wall time. With `--against` the same
cases run on another checkout of the service too, in turn with this one, and the table shows before, after and how many
times less it takes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

CASES = {
    "planning": "scheduling",
    "decoding": "scheduling",
    "tables": "scheduling",
    "streaming": "streaming",
    "adapters": "adapters",
}
"""By name the module whose `CASES` holds it: another checkout may have what some of them import under other names."""
HERE = Path(__file__).parents[3]
PACKAGES = ("service", "clients/python/src", "kernels")


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3, help="processes per checkout")
    parser.add_argument("--json", action="store_true", help="one round of this checkout, as JSON on stdout")
    options = parser.parse_args()
    cases = options.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if options.json:
        print(json.dumps({name: seconds for case in cases for name, seconds in measured_by(case)()}))
        return
    checkouts = [HERE] if options.against is None else [options.against.resolve(), HERE]
    measured: list[defaultdict[str, list[float]]] = [defaultdict(list) for _ in checkouts]
    for number in range(options.rounds):
        for checkout, times in zip(checkouts, measured, strict=True):
            print(f"round {number + 1} of {options.rounds}: {checkout}", file=sys.stderr, flush=True)
            for name, seconds in one_round(checkout, cases).items():
                times[name].append(seconds)
    for name in measured[-1]:
        *before, after = (statistics.median(times[name]) for times in measured)
        line = "".join(f"{seconds * 1e6:12.1f} us" for seconds in (*before, after))
        print(f"{name:85}{line}" + "".join(f"{seconds / after:9.2f}" for seconds in before))


def measured_by(case: str) -> Callable[[], Iterator[tuple[str, float]]]:
    """What yields the names and seconds of a case."""
    found: Callable[[], Iterator[tuple[str, float]]]
    found = importlib.import_module(f"tests.bench.host.{CASES[case]}").CASES[case]
    return found


def one_round(checkout: Path, cases: list[str]) -> dict[str, float]:
    """Seconds by name, measured in a process that imports the service of `checkout` and these cases."""
    paths = os.pathsep.join([*(str(checkout / package) for package in PACKAGES), str(HERE)])
    command = [sys.executable, "-m", "tests.bench.host", "--json", *cases]
    done = subprocess.run(
        command, cwd=HERE, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, check=True
    )
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


if __name__ == "__main__":
    main()
