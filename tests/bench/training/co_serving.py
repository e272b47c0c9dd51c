"""Training beside serving, over HTTP: what each costs the other, and how soon the new adapter answers."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import httpx

from tenora.cli.bench.figures import percentile
from tenora.cli.bench.load import Load
from tests.bench.serving.fixture import Base, Served, serve
from tests.bench.serving.memory import MIB, proportional_set_size

STREAMS = 8
ROUNDS = 3
_TRAINED = re.compile(r"^tenora_train_tokens_total(?:\{\})? ([0-9.e+]+)$", re.MULTILINE)


def co_serving(model: Path, threads: int, work: Path, rows: Path) -> dict[str, Any]:
    """A server of its own: decode alone, train alone, both, then a short job to its first token."""
    with contextlib.ExitStack() as stack:
        served = serve(stack, Base.of(model), work / "co-serving", threads)
        names = served.add(STREAMS)
        served.warm(names)
        alone = [_load(served, names) for _ in range(ROUNDS)]
        before = proportional_set_size(served.processes()["engine"])
        file = served.client.files.upload(rows)
        job = served.client.jobs.create(file, name="beside", n_epochs=20)
        _until_trained(served, 1)
        idle = _speed(served, 30.0)
        training = served.client.jobs.get(job.id)
        started, tokens = time.monotonic(), _trained(served)
        beside = [_load(served, names) for _ in range(ROUNDS)]
        busy = (_trained(served) - tokens) / (time.monotonic() - started)
        peak = proportional_set_size(served.processes()["engine"])
        served.client.jobs.cancel(training.id)
        p95 = {name: _p95(loads) for name, loads in (("alone", alone), ("beside", beside))}
        return {
            "inter_token_p95_ratio": p95["beside"] / p95["alone"],
            "training_speed_ratio": busy / idle,
            "inter_token_p95_ms_alone": 1e3 * p95["alone"],
            "inter_token_p95_ms_beside": 1e3 * p95["beside"],
            "output_tokens_per_s_alone": sum(load.output_rate for load in alone) / ROUNDS,
            "output_tokens_per_s_beside": sum(load.output_rate for load in beside) / ROUNDS,
            "learned_tokens_per_s_alone": idle,
            "learned_tokens_per_s_beside": busy,
            "job_memory_mib": (peak - before) / MIB,
            **_to_first_token(served, rows, work),
        }


def _load(served: Served, names: list[str]) -> Load:
    return served.load(names, streams=STREAMS)


def _p95(loads: list[Load]) -> float:
    return percentile([gap for load in loads for sample in load.good for gap in sample.gaps], 95)


def _trained(served: Served) -> float:
    headers = {"Authorization": f"Bearer {served.server.key()}"}
    found = _TRAINED.search(httpx.get(f"{served.server.url}/metrics", headers=headers).text)
    return float(found[1]) if found else 0.0


def _until_trained(served: Served, tokens: float) -> None:
    while _trained(served) < tokens:
        time.sleep(0.2)


def _speed(served: Served, seconds: float) -> float:
    """Learned tokens per second over at least so many seconds."""
    started, tokens = time.monotonic(), _trained(served)
    time.sleep(seconds)
    return (_trained(served) - tokens) / (time.monotonic() - started)


def _to_first_token(served: Served, rows: Path, work: Path) -> dict[str, float]:
    """From the last optimizer step of a short job to the first token of its adapter, and what evaluating took of it."""
    short = work / "short.jsonl"
    short.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    file = served.client.files.upload(short)
    job = served.client.jobs.create(file, name="quick", max_steps=4)
    last_step = evaluated = 0.0
    seen: set[str] = set()
    while True:
        for event in reversed(list(served.client.jobs.events(job.id, limit=50))):
            if event.id not in seen:
                seen.add(event.id)
                if event.message.startswith("Step 4/4: training"):
                    last_step = time.perf_counter()
                elif event.message.startswith("Step 4/4: validation"):
                    evaluated = time.perf_counter()
        if served.client.jobs.get(job.id).status == "succeeded":
            break
        time.sleep(0.02)
    served.load(["quick"], streams=1, prompt_tokens=16, output_tokens=1)
    ended = time.perf_counter()
    return {"last_step_to_first_token_s": ended - last_step, "beyond_evaluation_s": ended - evaluated}
