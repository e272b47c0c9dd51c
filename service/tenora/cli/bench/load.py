"""The load generator: one process, one thread, asyncio. It measures its own share of the processor too."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop

from tenora.cli.bench.exchange import Address, Connection, Sample
from tenora.cli.bench.workload import Ask


@dataclass(frozen=True, slots=True)
class Load:
    """All that happened to one list of requests.

    Attributes:
        samples: in the order of the requests.
        seconds: from the first request to the last token.
        client_cpu: processor seconds that the load generator itself took.
    """

    samples: list[Sample]
    seconds: float
    client_cpu: float

    @property
    def good(self) -> list[Sample]:
        """The requests that succeeded."""
        return [sample for sample in self.samples if not sample.error]

    @property
    def output_tokens(self) -> int:
        """Tokens that were generated."""
        return sum(sample.output_tokens for sample in self.good)

    @property
    def output_rate(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0


def run(address: Address, asks: Sequence[Ask], concurrency: int) -> Load:
    """Send `asks` in order over `concurrency` connections, each as soon as one is free and its time has come."""
    return uvloop.run(_run(address, asks, concurrency))


async def _run(address: Address, asks: Sequence[Ask], concurrency: int) -> Load:
    bodies = [address.request(body(ask)) for ask in asks]
    samples = [Sample(ask.model, ask.group, 0.0) for ask in asks]
    connections = await asyncio.gather(*(address.connect() for _ in range(min(concurrency, len(asks)))))
    waiting = deque(range(len(asks)))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a pause of ours would be seen as one of the server's
    started, cpu = time.perf_counter(), time.process_time()
    try:
        await asyncio.gather(
            *(_work(connection, address, asks, bodies, samples, waiting, started) for connection in connections)
        )
    finally:
        cpu = time.process_time() - cpu
        if collecting:
            gc.enable()
    ended = max((sample.ended for sample in samples if not sample.error), default=time.perf_counter())
    first = min((sample.sent for sample in samples if not sample.error), default=started)
    return Load(samples, ended - first, cpu)


async def _work(
    connection: Connection,
    address: Address,
    asks: Sequence[Ask],
    bodies: Sequence[bytes],
    samples: Sequence[Sample],
    waiting: deque[int],
    started: float,
) -> None:
    """One stream: the next request, when the last is answered."""
    while waiting:
        index = waiting.popleft()
        delay = started + asks[index].at - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        if not connection.open:
            try:
                connection = await address.connect()
            except OSError as error:
                samples[index].error = f"no connection: {error}"
                continue
        await connection.send(bodies[index], samples[index])
    connection.close()


def body(ask: Ask) -> dict[str, object]:
    """The JSON of a request: greedy, of exactly `max_tokens`, streamed, with its usage at the end."""
    return {
        "model": ask.model,
        "prompt": list(ask.prompt),
        "max_tokens": ask.max_tokens,
        "min_tokens": ask.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
