"""`python -m tests.bench.peers setup|run|all`: install the peers, run them beside Tenora, print the ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tenora.cli.bench.figures import head
from tenora.cli.output import show_table
from tenora.model.catalog import resolve_model
from tests.bench.peers.environments import ENVIRONMENTS, REPO, SetupError, ready, set_up
from tests.bench.peers.side_by_side import (
    Plan,
    Result,
    against_base,
    import_adapters,
    measure,
    write_adapters,
    yardsticks,
)
from tests.bench.peers.worker import WorkerError
from tests.bench.serving.fixture import Base, default_threads, end_in_order, serve
from tests.bench.serving.quiet import NOISY

KINDS = {"distinct": (True,), "none": (False,), "both": (True, False)}
COLUMNS = ("peer", "dtype", "streams", "adapters", "ratio", "peer tok/s", "tenora tok/s", "repeats", "others")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("action", choices=("setup", "run", "all"))
    parser.add_argument("--only", default=",".join(ENVIRONMENTS), help="peers, with commas between them")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="streams")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], help="of the peers")
    parser.add_argument("--adapters", choices=tuple(KINDS), default="both", help="every stream its own; none; both")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=40.0, help="seconds that one measurement of a peer may take")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--model", type=Path, default=None, help="base directory; default: smollm2-135m, fetched")
    parser.add_argument("--work", type=Path, default=REPO / ".bench", help="environments, adapters, logs")
    parser.add_argument("--json", type=Path, default=None, help="default: peers.json in --work")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(ENVIRONMENTS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    return options


def main(arguments: list[str]) -> int:
    """0 if every peer that was asked for ran."""
    options = parse(arguments)
    work = options.work.resolve()
    failed: dict[str, str] = {}
    if options.action in ("setup", "all"):
        for peer in options.only:
            try:
                set_up(work, peer)
            except SetupError as error:
                failed[peer] = str(error)
    if options.action in ("run", "all"):
        failed |= {peer: "is not set up" for peer in options.only if peer not in failed and not ready(work, peer)}
        usable = [peer for peer in options.only if peer not in failed]
        if usable:
            failed |= run(options, work, usable)
    for peer, reason in failed.items():
        print(f"{peer}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def run(options: argparse.Namespace, work: Path, peers: list[str]) -> dict[str, str]:
    """Measure, print and write; the peers that failed."""
    home = Path(os.environ.get("TENORA_HOME") or "~/.tenora").expanduser()
    directory = options.model or resolve_model("smollm2-135m", home).directory
    plan = Plan(
        work=work,
        base=Base.of(directory.resolve()),
        threads=options.threads,
        batches=tuple(options.batch),
        dtypes=tuple(options.dtype),
        adapters_or_none=KINDS[options.adapters],
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        limit=options.limit,
    )
    write_adapters(plan)
    results: list[Result] = []
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        served = serve(stack, plan.base, work / "tenora-home", plan.threads)
        names = import_adapters(plan, served)
        for peer in peers:
            try:
                for result in measure(plan, served, names, [peer]):
                    results.append(result)
                    print(*cells(result), sep="  ", flush=True)
                    write(options, plan, results, failed)
            except (WorkerError, SetupError) as error:
                failed[peer] = str(error)
    write(options, plan, results, failed)
    print()
    show_table(COLUMNS, [cells(result) for result in yardsticks(results)])
    return failed


def cells(result: Result) -> tuple[Any, ...]:
    """A result as a line of the table."""
    kind = "distinct" if result.adapters else "none"
    times = "extrapolated" if result.extrapolated else result.repeats
    rates = (f"{result.ratio:.2f}", f"{result.peer_tokens_per_s:.1f}", f"{result.tenora_tokens_per_s:.1f}")
    others = f"{result.foreign_cores:.2f} cores" + (", NOISY" if result.foreign_cores > NOISY else "")
    return (result.peer, result.dtype, result.batch, kind, *rates, times, others)


def write(options: argparse.Namespace, plan: Plan, results: list[Result], failed: dict[str, str]) -> None:
    """The report so far."""
    parameters = {
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "threads": plan.threads,
        "model": plan.base.directory.name,
        "peers": {name: list(environment.requirements) for name, environment in ENVIRONMENTS.items()},
    }
    report = {
        **head("peers", parameters),
        "measurements": [result.row for result in results],
        "yardsticks": [result.row for result in yardsticks(results)],
        "adapters_to_vllm_without_any": against_base(results),
        "failed": failed,
    }
    target = options.json or plan.work / "peers.json"
    target.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
