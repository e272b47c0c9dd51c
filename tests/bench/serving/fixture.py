"""A `tenora serve` to measure, with random adapters in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tenora.adapters.targets import TargetModule
from tenora.cli.bench import load
from tenora.cli.bench.exchange import Address
from tenora.cli.bench.figures import median
from tenora.cli.bench.load import Load
from tenora.cli.bench.subjects import Subject, import_random
from tenora.cli.bench.workload import Ask, prompts
from tenora.model.spec import ModelSpec, target_modules
from tenora_client import Client
from tests.e2e.serving import Server

ADAPTER_POOL = 1024 * 2**20


@dataclass(frozen=True)
class Base:
    """The base directory, and what of it the benchmark needs to know."""

    directory: Path
    targets: tuple[TargetModule, ...]
    vocabulary: int
    parameters: int

    @classmethod
    def of(cls, directory: Path) -> Base:
        """Read it off the directory."""
        spec = ModelSpec.from_directory(directory)
        nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        return cls(directory, target_modules(spec), spec.vocab_size, nbytes // 2)


@dataclass
class Served:
    """A running server and the adapters that were imported into it, by rank."""

    server: Server
    base: Base
    client: Client
    model: str
    adapters: dict[int, list[Subject]] = field(default_factory=dict)
    _round: int = 0

    @property
    def address(self) -> Address:
        """Where the load generator sends to."""
        return Address.of(self.server.url, self.server.key())

    def add(self, count: int, rank: int = 16) -> list[str]:
        """Import random adapters; their names."""
        known = self.adapters.setdefault(rank, [])
        seed = 100_000 * rank + len(known)
        made = import_random(self.client, self.base.targets, [rank] * count, prefix=f"n{len(known)}", seed=seed)
        known += made
        return [subject.name for subject in known[-count:]]

    def names(self, rank: int = 16) -> list[str]:
        """All adapters of a rank."""
        return [subject.name for subject in self.adapters.get(rank, [])]

    def load(
        self,
        models: Sequence[str | None],
        *,
        streams: int,
        prompt_tokens: int = 64,
        output_tokens: int = 64,
        groups: Sequence[str] = (),
    ) -> Load:
        """One request per entry of `models` (None: the base), `streams` at a time; prompts never repeat.

        Raises:
            RuntimeError: if a request fails.
        """
        self._round += 1
        ids = prompts(len(models), prompt_tokens, vocabulary=self.base.vocabulary, seed=7919 * self._round)
        labels = groups or [""] * len(models)
        asks = [
            Ask(model or self.model, prompt, output_tokens, group=group)
            for model, prompt, group in zip(models, ids, labels, strict=True)
        ]
        done = load.run(self.address, asks, streams)
        bad = [sample.error for sample in done.samples if sample.error]
        if bad:
            raise RuntimeError(f"{len(bad)} of {len(asks)} requests failed: {bad[0]}")
        return done

    def warm(self, names: Sequence[str | None]) -> None:
        """Have each adapter answer once, so that it is resident, and everything compiled."""
        for start in range(0, len(names), 32):
            self.load(names[start : start + 32], streams=32, output_tokens=4)

    def processes(self) -> dict[str, int]:
        """The ids of the two processes of the service."""
        return {"server": self.server.process.pid, "engine": self.server.engine().pid}


def serve(stack: contextlib.ExitStack, base: Base, home: Path, threads: int, **settings: str) -> Served:
    """Start a server on a fresh state directory; it stops, and the directory goes, when the stack unwinds."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    stack.callback(shutil.rmtree, home, ignore_errors=True)
    defaults = {
        "TENORA_THREADS": str(threads),
        "TENORA_ADAPTER_POOL_BYTES": str(ADAPTER_POOL),
        "TENORA_LOG_LEVEL": "warning",
    }
    server = Server(home, base.directory, **{**defaults, **settings})
    stack.callback(server.stop)
    server.start()
    client = stack.enter_context(server.client())
    return Served(server, base, client, client.models.base().id)


def interleaved(repeats: int, **sides: Callable[[], Load]) -> dict[str, list[Load]]:
    """Each side's load once per repeat, in turn, the order reversed every other time; the first repeat warms up.

    Args:
        repeats: that count.
        sides: name → a callable that makes the load.
    """
    done: dict[str, list[Load]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            result = sides[name]()
            if number:
                done[name].append(result)
    return done


def rate(loads: Sequence[Load]) -> float:
    """Median output tokens per second."""
    return median([one.output_rate for one in loads])


def pair_ratio(above: Sequence[Load], below: Sequence[Load]) -> float:
    """Median over repeats of the ratio of the two rates that were measured side by side."""
    return median([a.output_rate / b.output_rate for a, b in zip(above, below, strict=True)])


def end_in_order() -> None:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that no server outlives a benchmark that is ended."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
