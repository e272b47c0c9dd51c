"""Measurements of a peer and of Tenora in turn, and their ratios."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tenora.cli.bench.figures import median
from tenora.cli.bench.subjects import write_random_adapter
from tests.bench.peers.environments import gguf, python_of
from tests.bench.peers.worker import Worker
from tests.bench.serving.fixture import Base, Served
from tests.bench.serving.quiet import Quiet

PROBE_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        work: the directory of environments, adapters and logs.
        batches: streams, each with an adapter of its own.
        dtypes: of the peers; the better one of them is the yardstick.
        adapters_or_none: which of the two kinds are measured: True, every row with an adapter; False, the base alone.
        repeats: that count; fewer where three of them would take longer than three times `limit`.
        limit: seconds that one measurement of a peer may take. Of a slower one the time is computed from two short
            runs of different lengths, and the result says so.
    """

    work: Path
    base: Base
    threads: int
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    adapters_or_none: tuple[bool, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    limit: float

    @property
    def adapters(self) -> Path:
        """Directory of the adapters a0, a1, …"""
        return self.work / "adapters"


@dataclass(frozen=True)
class Result:
    """One peer at one batch size. Rates are output tokens per second, medians; `ratio` is Tenora's to the peer's.

    Attributes:
        adapters: every row has one of its own; False is the base alone.
        foreign_cores: cores that other programs kept busy meanwhile; above 0.1 the figures are noise.
        extrapolated: the peer is too slow to be waited for; its time was computed from two short runs.
    """

    peer: str
    dtype: str
    batch: int
    adapters: bool
    ratio: float
    peer_tokens_per_s: float
    tenora_tokens_per_s: float
    repeats: int
    extrapolated: bool = False
    foreign_cores: float = 0.0

    @property
    def row(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def write_adapters(plan: Plan) -> None:
    """Random rank-16 adapters of all projections, bfloat16; those that are there stay."""
    plan.adapters.mkdir(parents=True, exist_ok=True)
    for index in range(max(plan.batches)):
        directory = plan.adapters / f"a{index}"
        if not directory.exists():
            write_random_adapter(directory, plan.base.targets, rank=16, seed=index)


def import_adapters(plan: Plan, served: Served) -> list[str]:
    """The same adapters in our server, resident."""
    names = [f"a{index}" for index in range(max(plan.batches))]
    for name in names:
        served.client.adapters.import_(name, plan.adapters / name)
    served.warm(names)
    return names


def measure(plan: Plan, served: Served, names: Sequence[str], peers: Sequence[str]) -> Iterator[Result]:
    """Every peer, dtype and batch size in turn.

    Raises:
        WorkerError: a peer ended.
    """
    for peer in peers:
        if peer == "llama":
            with _worker(plan, "llama", gguf=str(gguf(plan.work))) as worker:
                yield from _adapters_against_base(plan, served, names, worker)
            continue
        for dtype in plan.dtypes:
            yield from _of_dtype(plan, served, names, peer, dtype)


def _of_dtype(plan: Plan, served: Served, names: Sequence[str], peer: str, dtype: str) -> Iterator[Result]:
    if peer == "peft":
        with _worker(plan, peer, dtype=dtype, batch=max(plan.batches)) as worker:
            for batch in plan.batches:
                for adapters in plan.adapters_or_none:
                    yield _compare(plan, served, names, worker, peer, dtype, batch, adapters=adapters)
        return
    # vLLM's cost grows with max_loras, so each batch size gets an engine that is made for it.
    for batch in plan.batches if True in plan.adapters_or_none else ():
        with _worker(plan, peer, dtype=dtype, batch=batch, lora=True) as worker:
            yield _compare(plan, served, names, worker, peer, dtype, batch, adapters=True)
    if False not in plan.adapters_or_none:
        return
    with _worker(plan, peer, dtype=dtype, batch=max(plan.batches), lora=False) as worker:
        for batch in plan.batches:
            yield _compare(plan, served, names, worker, peer, dtype, batch, adapters=False)


@contextlib.contextmanager
def _worker(plan: Plan, peer: str, **settings: Any) -> Iterator[Worker]:
    common = {"base": str(plan.base.directory), "adapters": str(plan.adapters), "threads": plan.threads}
    log = plan.work / f"{peer}.log"
    with Worker(python_of(plan.work, peer), peer, {**common, **settings}, log) as worker:
        yield worker


def _compare(
    plan: Plan,
    served: Served,
    names: Sequence[str],
    worker: Worker,
    peer: str,
    dtype: str,
    batch: int,
    *,
    adapters: bool,
) -> Result:
    """The peer and Tenora in turn, the same work each, and whether they had the machine to themselves."""
    with Quiet() as quiet:
        found = _in_turn(plan, served, names, worker, peer, dtype, batch, adapters=adapters)
    return replace(found, foreign_cores=quiet.foreign)


def _in_turn(
    plan: Plan,
    served: Served,
    names: Sequence[str],
    worker: Worker,
    peer: str,
    dtype: str,
    batch: int,
    *,
    adapters: bool,
) -> Result:
    def ask(new_tokens: int, seed: int) -> float:
        question = {"batch": batch, "adapters": adapters, "prompt_tokens": plan.prompt_tokens, "seed": seed}
        return float(worker.ask(new_tokens=new_tokens, **question)["seconds"])

    models = list(names[:batch]) if adapters else [None] * batch

    def ours() -> float:
        done = served.load(models, streams=batch, prompt_tokens=plan.prompt_tokens, output_tokens=plan.new_tokens)
        return done.output_rate

    ask(PROBE_TOKENS, 0)  # the first one compiles and packs
    ours()
    short = ask(PROBE_TOKENS, 1)
    longer = ask(4 * PROBE_TOKENS, 2)
    step = max(0.0, (longer - short) / (3 * PROBE_TOKENS))
    expected = short + step * (plan.new_tokens - PROBE_TOKENS)
    if expected > plan.limit:
        return Result(
            peer, dtype, batch, adapters, *_ratio([batch * plan.new_tokens / expected], [ours()]), 1, extrapolated=True
        )
    repeats = max(1, min(plan.repeats, int(3 * plan.limit / expected)))
    theirs, rates = [], []
    for number in range(repeats):
        theirs.append(batch * plan.new_tokens / ask(plan.new_tokens, 10 + number))
        rates.append(ours())
    return Result(peer, dtype, batch, adapters, *_ratio(theirs, rates), repeats)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios of pairs, then both medians."""
    return median([b / a for a, b in zip(theirs, ours, strict=True)]), median(theirs), median(ours)


def _adapters_against_base(plan: Plan, served: Served, names: Sequence[str], worker: Worker) -> Iterator[Result]:
    """llama.cpp: one stream, its quantised base without an adapter, against ours with one and without."""
    for adapters in plan.adapters_or_none:
        yield _compare(plan, served, names, worker, "llama.cpp", "q4_1, no adapter", 1, adapters=adapters)


def yardsticks(results: Sequence[Result]) -> list[Result]:
    """Of each peer, batch size and kind the result in which the peer was at its best."""
    best: dict[tuple[str, int, bool], Result] = {}
    for result in results:
        key = (result.peer, result.batch, result.adapters)
        if key not in best or result.peer_tokens_per_s > best[key].peer_tokens_per_s:
            best[key] = result
    return list(best.values())


def against_base(results: Sequence[Result]) -> dict[str, float]:
    """Per batch size: Tenora's rate with distinct adapters to the best of vLLM without any."""
    best = yardsticks([result for result in results if result.peer == "vllm"])
    plain = {result.batch: result.peer_tokens_per_s for result in best if not result.adapters}
    return {
        str(result.batch): result.tenora_tokens_per_s / plain[result.batch]
        for result in best
        if result.adapters and result.batch in plain
    }
