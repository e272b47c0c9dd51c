"""The engine with its default settings under 64 streams, without HTTP: alone, with adapters swapping, beside a job."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.ref import AdapterRef
from tenora.engine.core import Engine
from tenora.engine.messages import Abort, Generate, Outputs, SamplingParams, SequenceOutput, StartTraining
from tenora.training.spec import LoraSpec
from tests.training.runs import default_spec, write_rows

STREAMS, PROMPT, ANSWER, RANK = 64, 1024, 128, 16


def random_adapters(engine: Engine) -> None:
    """Adapters of rank 16 on all modules come from memory, not from disk: what is measured begins there."""
    tables = engine.pool.tables
    ranks = (RANK,) * tables.rows
    values = torch.randn(tables.numel(ranks)).mul_(0.01).to(tables.arena.dtype)
    engine.loader._read = lambda _: PreparedAdapter(values, ranks, (1.0,) * tables.rows)


def stream(
    engine: Engine,
    seconds: float,
    adapter: Callable[[int], AdapterRef | None] = lambda _: None,
    /,
    *,
    streams: int = STREAMS,
    prompt: int = PROMPT,
    answer: int = ANSWER,
) -> dict[str, Any]:
    """Keep so many requests open for so long, and until one has ended; figures of what came meanwhile."""
    rng, begun = np.random.default_rng(0), 0
    asked: dict[str, float] = {}
    last: dict[str, float] = {}
    first: list[float] = []
    gaps: list[float] = []
    tokens = failed = ended = 0
    started = now = time.monotonic()
    while now - started < seconds or ended == 0:
        while len(asked) < streams:
            ids = rng.integers(3, engine.decoder.spec.vocab_size, prompt).tolist()
            sampling = SamplingParams(temperature=0.0, max_tokens=answer)
            name = f"{started}-{begun}"
            engine.add(Generate(request_id=name, token_ids=ids, sampling=sampling, adapter=adapter(begun)))
            asked[name], begun = now, begun + 1
        events = engine.step()
        now = time.monotonic()
        for event in events:
            for item in event.items if isinstance(event, Outputs) else ():
                over = not isinstance(item, SequenceOutput) or item.finish_reason is not None
                if isinstance(item, SequenceOutput):
                    tokens += len(item.token_ids)
                    since = last.get(item.request_id)
                    (first if since is None else gaps).append(now - (since or asked[item.request_id]))
                    last[item.request_id] = now
                failed += not isinstance(item, SequenceOutput)
                ended += over
                if over:
                    asked.pop(item.request_id)
                    last.pop(item.request_id, None)
    for name in asked:
        engine.add(Abort(name))
    return {
        "tokens_per_s": round(tokens / (now - started), 1),
        "requests": begun,
        "failed": failed,
        **{
            f"{name}_p{share}_ms": round(1e3 * float(np.percentile(values, share)), 2) if values else None
            for name, values in (("ttft", first), ("itl", gaps))
            for share in (50, 95)
        },
    }


def run(engine: Engine, directory: Path, *, seconds: float = 60.0, **sizes: int) -> dict[str, Any]:
    """Alone; with twice as many adapters as there are slots for; with a job of rank 16."""
    random_adapters(engine)
    fits = engine.pool.max_bytes // max(1, engine.pool.tables.numel((RANK,) * engine.pool.tables.rows) * 2)
    swapped = 2 * max(1, min(fits, engine.pool.tables.slots))
    stream(engine, seconds / 10, **sizes)
    report: dict[str, Any] = {"settings": engine.ready.memory, "alone": stream(engine, seconds, **sizes)}
    report["swapping"] = stream(engine, seconds, lambda number: AdapterRef(f"a{number % swapped}", ""), **sizes) | {
        "adapters": swapped,
        "loads": engine.loader.loads,
    }
    write_rows(directory)
    lora = LoraSpec(rank=RANK, alpha=32.0)
    before = engine.trainer.trained_tokens
    engine.add(StartTraining(default_spec(directory, "job", lora=lora, n_epochs=10_000, batch_size=14)))
    report["beside_a_job"] = stream(engine, seconds, **sizes)
    report["beside_a_job"]["trained_tokens"] = engine.trainer.trained_tokens - before
    return report
