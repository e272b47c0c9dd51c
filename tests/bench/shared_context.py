"""Many adapters look at one long context: `python -m tests.bench.shared_context --model DIR`.

Activated LoRA beside LoRA, same weights: prompt tokens computed, and the time to the first token, of requests that come
one after the other and of requests that come together. The engine runs in this process.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine.core import Engine
from tenora.engine.messages import Generate, Outputs, SamplingParams, SequenceFailed

INVOCATION = (1, 3, 5, 7)
RANK = 16


def adapter(engine: Engine, seed: int, invocation: tuple[int, ...]) -> PreparedAdapter:
    """Random weights on every projection, bfloat16 where the pool takes it."""
    rows = engine.rows
    ranks = tuple(RANK if row < len(rows.modules) else 0 for row in range(len(rows)))
    values = torch.randn(rows.numel(ranks), generator=torch.Generator().manual_seed(seed)) * 0.01
    arena = engine.pool.tables.arena
    return PreparedAdapter(
        values.to(arena.device, torch.bfloat16 if arena.device.type == "cpu" else arena.dtype),
        ranks,
        tuple(1.0 if rank else 0.0 for rank in ranks),
        invocation=invocation,
    )


def first_tokens(engine: Engine, requests: list[Generate]) -> list[float]:
    """Seconds from now to the first token of each request; all of them come now."""
    started = time.perf_counter()
    found: dict[str, float] = {}
    for request in requests:
        engine.add(request)
    while len(found) < len(requests):
        for event in engine.step():
            for item in event.items if isinstance(event, Outputs) else ():
                if isinstance(item, SequenceFailed):
                    raise SystemExit(item.message)
                found[item.request_id] = time.perf_counter() - started
    return list(found.values())


def measure(
    engine: Engine, args: argparse.Namespace, *, activated: bool, together: bool, repeat: int
) -> dict[str, Any]:
    """One round on a context that nobody has seen."""
    random = torch.Generator().manual_seed(repeat)
    context = torch.randint(1000, engine.decoder.spec.vocab_size, (args.context,), generator=random).tolist()
    salt = f"{activated} {together} {repeat}"
    scheduler = engine.scheduler
    before = scheduler.prefix_queries - scheduler.prefix_hits
    requests = [
        Generate(
            request_id=f"{salt} {number}",
            token_ids=[*context, *INVOCATION],
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            adapter=AdapterRef(f"{activated} {number}", ""),
            cache_salt=salt,
        )
        for number in range(args.adapters)
    ]
    rounds = [requests] if together else [[request] for request in requests]
    times = [seconds for each in rounds for seconds in first_tokens(engine, each)]
    computed = scheduler.prefix_queries - scheduler.prefix_hits - before
    return {"computed": computed, "first_s": times[0], "median_s": median(times), "last_s": times[-1]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base")
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--context", type=int, default=1500, help="tokens of the context")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the report here, too")
    args = parser.parse_args()
    engine = Engine.load(Settings(max_adapters=2 * args.adapters), args.model)
    for activated in (True, False):
        for number in range(args.adapters):
            invocation = INVOCATION if activated else ()
            engine.loader.offer(f"{activated} {number}", adapter(engine, number, invocation))
    report: dict[str, Any] = {"context": args.context, "adapters": args.adapters}
    for together in (False, True):
        rounds: dict[str, list[dict[str, Any]]] = {"alora": [], "lora": []}
        for repeat in range(args.repeats):
            for name, done in rounds.items():
                done.append(measure(engine, args, activated=name == "alora", together=together, repeat=repeat))
        for name, done in rounds.items():
            when = "together" if together else "in turn"
            found = {key: median([each[key] for each in done]) for key in done[0]}
            report[f"{name}, {when}"] = found | {"contexts_computed": found["computed"] / args.context}
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(report))
    engine.shutdown()


if __name__ == "__main__":
    main()
