"""The serving cases: `python -m tests.bench.serving.cases --model DIR [CASE …]`. Ratios first; medians of the repeats.

Whatever two things a ratio compares were measured in turn, in this run, on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenora.cli.bench.figures import head, median
from tenora.cli.bench.load import Load
from tenora.cli.bench.workload import Distribution
from tests.bench.serving.fixture import (
    Base,
    Served,
    default_threads,
    end_in_order,
    interleaved,
    pair_ratio,
    rate,
    serve,
)
from tests.bench.serving.forward import TransformersForward
from tests.bench.serving.memory import memory
from tests.bench.serving.quiet import NOISY, Quiet

STREAMS = 32


@dataclass(frozen=True)
class Run:
    """What a case is given."""

    base: Base
    home: Path
    threads: int
    repeats: int
    registered: int
    stack: contextlib.ExitStack

    def serve(self, name: str, **settings: str) -> Served:
        """A fresh server of this case."""
        return serve(self.stack, self.base, self.home / name, self.threads, **settings)


def distinct(run: Run) -> dict[str, Any]:
    """32 streams of 32 distinct adapters, against the base alone on the same server."""
    served = run.serve("a")
    names = served.add(STREAMS)
    served.warm(names)
    done = interleaved(
        run.repeats,
        adapters=lambda: served.load(names, streams=STREAMS),
        base=lambda: served.load([None] * STREAMS, streams=STREAMS),
    )
    return {
        "adapters_to_base": pair_ratio(done["adapters"], done["base"]),
        "adapters_tokens_per_s": rate(done["adapters"]),
        "base_tokens_per_s": rate(done["base"]),
        **times("adapters", done["adapters"]),
        **times("base", done["base"]),
    }


def base_only(run: Run) -> dict[str, Any]:
    """32 streams of the base: a server with 32 resident adapters against a server without any."""
    filled, empty = run.serve("a"), run.serve("b")
    filled.warm(filled.add(STREAMS))
    done = interleaved(
        run.repeats,
        filled=lambda: filled.load([None] * STREAMS, streams=STREAMS),
        empty=lambda: empty.load([None] * STREAMS, streams=STREAMS),
    )
    return {
        "filled_to_empty": pair_ratio(done["filled"], done["empty"]),
        "filled_tokens_per_s": rate(done["filled"]),
        "empty_tokens_per_s": rate(done["empty"]),
    }


def few_streams(run: Run) -> dict[str, Any]:
    """8 streams of 8 distinct adapters, and one stream with an adapter, each against the base."""
    served = run.serve("a")
    names = served.add(8)
    served.warm(names)
    found: dict[str, Any] = {}
    for streams in (8, 1):
        done = interleaved(
            run.repeats,
            adapters=partial(served.load, names[:streams], streams=streams),
            base=partial(served.load, [None] * streams, streams=streams),
        )
        found |= {
            f"adapters_to_base_{streams}": pair_ratio(done["adapters"], done["base"]),
            f"adapters_tokens_per_s_{streams}": rate(done["adapters"]),
            f"base_tokens_per_s_{streams}": rate(done["base"]),
            **times(f"adapters_{streams}", done["adapters"]),
        }
    return found


def many_registered(run: Run) -> dict[str, Any]:
    """1,000 adapters registered, Zipf-1.1 over 32 streams, 64 slots, against 32 adapters that stay resident."""
    served = run.serve("a", TENORA_MAX_ADAPTERS="64")
    names = served.add(run.registered)
    resident = names[:STREAMS]
    requests = 4 * STREAMS
    served.warm(resident)
    law, seeds = Distribution("zipf", 1.1), iter(range(1000))

    def zipf() -> Load:
        chosen = law.draw(len(names), requests, next(seeds))
        return served.load([names[index or 0] for index in chosen], streams=STREAMS)

    def known() -> Load:
        served.warm(resident)  # the Zipf round before has put others in their slots
        return served.load([resident[index % STREAMS] for index in range(requests)], streams=STREAMS)

    done = interleaved(run.repeats, zipf=zipf, resident=known)
    return {
        "zipf_to_resident": pair_ratio(done["zipf"], done["resident"]),
        "zipf_tokens_per_s": rate(done["zipf"]),
        "resident_tokens_per_s": rate(done["resident"]),
        "registered": len(names),
        "distinct_a_round": median([len({sample.model for sample in one.samples}) for one in done["zipf"]]),
        "import_ms": 1e3 * median([subject.import_seconds for subject in served.adapters[16]]),
        **times("zipf", done["zipf"]),
        **times("resident", done["resident"]),
    }


def mixed_ranks(run: Run) -> dict[str, Any]:
    """What a rank-64 adapter does to 31 rank-16 rows: resident but not asked, and asked by the 32nd stream."""
    small, mixed = run.serve("a"), run.serve("b")
    names, same = small.add(STREAMS), mixed.add(STREAMS)
    (large,) = mixed.add(1, rank=64)
    small.warm(names)
    mixed.warm([*same, large])
    labels = ["rank16"] * (STREAMS - 1) + ["other"]
    done = interleaved(
        run.repeats,
        without=lambda: small.load(names, streams=STREAMS, groups=labels),
        resident=lambda: mixed.load(same, streams=STREAMS, groups=labels),
        asked=lambda: mixed.load([*same[:-1], large], streams=STREAMS, groups=labels),
    )
    found = {name: [per_token(one, "rank16") for one in loads] for name, loads in done.items()}
    pairs = {
        name: median([a / b for a, b in zip(found[name], found["without"], strict=True)])
        for name in ("resident", "asked")
    }
    return {
        "slowdown_resident": pairs["resident"],
        "slowdown_asked": pairs["asked"],
        **{f"rank16_ms_{name}": median(values) for name, values in found.items()},
    }


def loading(run: Run) -> dict[str, Any]:
    """An adapter from disk (bfloat16, rank 16) to its first token, beyond a resident one's; and its import."""
    from tenora.cli.bench.loading import measure

    served = run.serve("a")
    served.warm([None])
    served.add(20)
    return measure(
        served.client,
        served.address,
        served.model,
        served.adapters[16],
        prompt_tokens=16,
        vocabulary=run.base.vocabulary,
        seed=1,
    )


def prefill(run: Run) -> dict[str, Any]:
    """512 prompt tokens with an adapter to the first token, against transformers' forward of the base."""
    served = run.serve("a", TENORA_MAX_NUM_BATCHED_TOKENS="512")
    (name,) = served.add(1)
    served.warm([name])
    ours: list[float] = []
    bare: list[float] = []
    theirs: dict[str, list[float]] = {}
    with TransformersForward(run.base.directory, run.threads, tokens=512) as peer:
        for number in range(run.repeats + 1):
            adapted = served.load([name], streams=1, prompt_tokens=512, output_tokens=1).samples[0].first_token
            plain = served.load([None], streams=1, prompt_tokens=512, output_tokens=1).samples[0].first_token
            forward = peer.seconds()
            if number:
                ours.append(adapted)
                bare.append(plain)
                for kind, seconds in forward.items():
                    theirs.setdefault(kind, []).append(seconds)
    medians = {kind: median(seconds) for kind, seconds in theirs.items()}
    return {
        "transformers_to_ours": min(medians.values()) / median(ours),
        "ours_ms": 1e3 * median(ours),
        "ours_base_ms": 1e3 * median(bare),
        **{f"transformers_{kind}_ms": 1e3 * seconds for kind, seconds in medians.items()},
    }


def resident_memory(run: Run) -> dict[str, Any]:
    """What both processes hold after a full load, and what of it is neither weights nor adapters nor KV cache."""
    caches = 128 * 2**20
    served = run.serve("a", TENORA_ADAPTER_POOL_BYTES=str(4 * caches), TENORA_KV_CACHE_BYTES=str(caches))
    names = served.add(STREAMS)
    served.warm(names)
    served.load(names, streams=STREAMS)
    adapters = STREAMS * 2 * sum(16 * (t.in_features + t.out_features) for t in run.base.targets)
    return memory(served.processes(), run.base.parameters, adapter_bytes=adapters, kv_bytes=caches)


CASES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "distinct": distinct,
    "base-only": base_only,
    "few-streams": few_streams,
    "many-registered": many_registered,
    "mixed-ranks": mixed_ranks,
    "loading": loading,
    "prefill": prefill,
    "memory": resident_memory,
}


def per_token(done: Load, group: str = "") -> float:
    """Median milliseconds per token of the requests of a group, prefill not included."""
    return 1e3 * median([sample.per_token for sample in done.good if sample.group == group])


def times(name: str, loads: list[Load]) -> dict[str, float]:
    """Median time to the first token and per token, and the load generator's own share of a core."""
    good = [sample for one in loads for sample in one.good]
    return {
        f"{name}_ttft_ms": 1e3 * median([sample.first_token for sample in good]),
        f"{name}_per_token_ms": median([per_token(one) for one in loads]),
        f"{name}_client_cpu_share": sum(one.client_cpu for one in loads) / sum(one.seconds for one in loads),
    }


def main(arguments: list[str]) -> int:
    """Run the cases that are named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving.cases", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; all if none is named")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--registered", type=int, default=1000, help="adapters of many-registered")
    parser.add_argument("--work", type=Path, default=None, help="where servers keep their state; default: temporary")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    base = Base.of(options.model)
    names = options.cases or list(CASES)
    parameters = {"repeats": options.repeats, "threads": options.threads, "model": options.model.name}
    report: dict[str, Any] = {**head("serving-cases", parameters), "cases": {}}
    with tempfile.TemporaryDirectory(prefix="tenora-bench-") as temporary:
        home = (options.work or Path(temporary)).resolve()
        for name in names:
            with contextlib.ExitStack() as stack:
                run = Run(base, home / name, options.threads, options.repeats, options.registered, stack)
                with Quiet() as quiet:
                    found = CASES[name](run)
                found["foreign_cores"] = quiet.foreign
            report["cases"][name] = found
            print(f"{name}: {(CASES[name].__doc__ or '').splitlines()[0]}", flush=True)
            for label, value in found.items():
                print(f"  {label:32} {value:.4g}" if isinstance(value, float) else f"  {label:32} {value}", flush=True)
            if quiet.foreign > NOISY:
                print(f"  NOISY: other programs kept {quiet.foreign:.2f} cores busy; measure again", flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    end_in_order()
    sys.exit(main(sys.argv[1:]))
