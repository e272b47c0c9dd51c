"""This checkout beside another: `python -m tests.bench.checkouts --against CHECKOUT --model DIR [bits] [speed]`.

`bits` asks a server of each for the same set of requests and jobs and names every answer that differs: tokens, log
probabilities, losses and digests are to be equal. `speed` measures both in turn; ratios are this checkout's rate to the
other's. The exit status is 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from tenora.cli.bench.figures import median
from tenora.model.spec import ModelSpec
from tenora.model.stack import can_pack
from tenora_kernels.cpu.runtime.levels import LEVELS, target_features
from tests.bench.checkouts.fixed_set import ROWS, TERMINAL, FixedSet
from tests.bench.serving.fixture import Base, Served, default_threads, end_in_order, interleaved, pair_ratio, serve
from tests.bench.serving.quiet import NOISY, Quiet

HERE = Path(__file__).parents[3]
PACKAGES = ("service", "clients/python/src", "kernels")
STREAMS = (1, 8, 32)


def main() -> int:
    """Print what differs, and a line per ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=["bits", "speed"], help="bits, speed")
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    parser.add_argument("--model", type=Path, required=True, help="directory of the base")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where this checkout's answers and the ratios are written")
    options = parser.parse_args()
    if unknown := set(options.cases) - {"bits", "speed"}:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    end_in_order()
    base, report = Base.of(options.model), {}
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before, after = (
            serve(stack, base, home / name, options.threads, PYTHONPATH=paths(checkout), **level(options.model))
            for name, checkout in (("before", options.against.resolve()), ("after", HERE))
        )
        if "bits" in options.cases:
            report["bits"] = bits(before, after)
        if "speed" in options.cases:
            report["speed"] = speed(before, after, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return int(bool(report.get("bits", {}).get("different")))


def paths(checkout: Path) -> str:
    """PYTHONPATH under which the installed command runs the code of `checkout`."""
    return os.pathsep.join(str(checkout / package) for package in PACKAGES)


def level(model: Path) -> dict[str, str]:
    """What servers are told of their processor: no AVX-512 for a base of which it makes no whole panels.

    The tiny bases are such. Its vectors would leave them to the modules, and nothing would be said of compiled layers.
    """
    if can_pack(ModelSpec.from_directory(model)) or not target_features().get("avx512f"):
        return {}
    return {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": LEVELS["x86-64-v3"]}


def bits(before: Served, after: Served) -> dict[str, Any]:
    """Every answer of the fixed set from both; names of those that differ, and this checkout's answers."""
    with before.server.raw() as one, after.server.raw() as other:
        answers, different = {}, []
        for (name, was), (_, now) in zip(FixedSet(one).items(), FixedSet(other).items(), strict=True):
            answers[name] = now
            if was != now:
                different.append(name)
            print(f"{name:50} {'equal' if was == now else f'DIFFERS: {difference(was, now)}'}", flush=True)
    print(f"{len(answers) - len(different)} of {len(answers)} answers are equal")
    return {"different": different, "answers": answers}


def difference(was: Any, now: Any, where: str = "") -> str:
    """The first place at which two answers differ, in words."""
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        return next((difference(was[key], now[key], f"{where}.{key}") for key in was if was[key] != now[key]), "")
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True))
        return next((difference(a, b, f"{where}[{index}]") for index, (a, b) in pairs if a != b), "")
    return f"{where}: {was!r:.200} was, {now!r:.200} is"


def speed(before: Served, after: Served, repeats: int) -> dict[str, float]:
    """Decode with adapters at several widths, prefill, and a job's steps, on both servers in turn."""
    ratios: dict[str, float] = {}

    def say(name: str, ratio: float, quiet: Quiet) -> None:
        ratios[name] = ratio
        print(f"{name:50} {ratio:6.3f}{'   NOISY' if quiet.foreign > NOISY else ''}", flush=True)

    for side in (before, after):
        side.warm([*side.add(max(STREAMS)), None])
    for count in STREAMS:
        for named in (True, False):
            with Quiet() as quiet:
                loads = {
                    name: partial(side.load, side.names()[:count] if named else [None] * count, streams=count)
                    for name, side in (("before", before), ("after", after))
                }
                done = interleaved(repeats, **loads)
            shown = f"decode, {count} streams of {'adapters' if named else 'the base'}"
            say(shown, pair_ratio(done["after"], done["before"]), quiet)
    with Quiet() as quiet:
        loads = {
            name: partial(side.load, side.names()[:4], streams=1, prompt_tokens=480, output_tokens=1)
            for name, side in (("before", before), ("after", after))
        }
        done = interleaved(repeats, **loads)
    say("prefill of 480 tokens", pair_ratio(done["after"], done["before"]), quiet)
    with Quiet() as quiet:
        rates = [(training(before, number), training(after, number)) for number in range(repeats)]
    say("training", median([now / was for was, now in rates]), quiet)
    return ratios


def training(side: Served, seed: int) -> float:
    """Tokens per second of the steps of one job, as its log tells them."""
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with side.server.raw() as http:
        sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", content)})
        body = {"model": side.model, "training_file": sent.json()["id"], "max_steps": 12, "batch_size": 32}
        job = http.post("/v1/fine_tuning/jobs", json={**body, "seed": seed}).json()
        while job["status"] not in TERMINAL:
            time.sleep(0.2)
            job = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
        if job["status"] != "succeeded":
            raise RuntimeError(f"the job ended as {job['status']}: {job['error']}")
        log = http.get(f"/v1/fine_tuning/jobs/{job['id']}/events", params={"limit": 100}).json()["data"]
    return median([line["data"]["tokens_per_second"] for line in log if line["data"].get("tokens_per_second")])


if __name__ == "__main__":
    sys.exit(main())
