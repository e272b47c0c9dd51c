"""What a step costs the engine before the model: planning it, and the block tables of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from tenora.adapters.ref import AdapterRef
from tenora.engine.block_tables import BlockTables
from tenora.engine.blocks import BlockManager
from tenora.engine.scheduler import Blocked, Scheduler
from tenora.engine.sequence import SequenceState
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.base import Batch
from tenora.model.executors.decode_graphs import DecodeGraphs
from tenora.model.spec import ModelSpec
from tests.bench.host.timing import median
from tests.engine.requests import ref, sequence

RUNNING, WAITING, BLOCK = 32, 1024, 16
REPEATS = 15


class Slots:
    """As many slots as sequences run; nobody else gets one, for the reason given."""

    def __init__(self, reason: Blocked) -> None:
        self.reason = reason
        self.taken: set[str] = set()

    def acquire(self, adapter: AdapterRef) -> int | Blocked:
        """A slot, as long as there are any."""
        if adapter.digest not in self.taken and len(self.taken) >= RUNNING:
            return self.reason
        self.taken.add(adapter.digest)
        return int(adapter.digest)

    def invocation(self, digest: str) -> tuple[int, ...]:  # the protocol's
        return ()

    def release(self, digest: str) -> None:
        """Nothing is given back."""


def waiting(groups: int, reason: Blocked) -> Scheduler:
    """A scheduler whose slots are taken, with `WAITING` sequences in so many groups, each with its own adapter."""
    scheduler = Scheduler(
        BlockManager(65536, BLOCK), Slots(reason), max_num_seqs=2 * RUNNING, max_num_batched_tokens=512
    )
    for number in range(RUNNING + WAITING):
        if number == RUNNING:
            step(scheduler)
        scheduler.add(sequence(range(8), adapter=ref(str(number)), share_group=f"group-{number % groups}"))
    step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> None:
    """What the engine does with the scheduler in one step."""
    look_ahead(scheduler)
    for item in scheduler.schedule():
        scheduler.computed(item)
        if item.samples:
            item.sequence.token_ids.append(7)


def look_ahead(scheduler: Scheduler) -> None:
    """Which adapters the engine would have read next."""
    list(scheduler.upcoming_adapters())


def planning() -> Iterator[tuple[str, float]]:
    """Seconds of `schedule()`, and of the look-ahead beside it."""
    for groups in (1024, 64, 1):
        scheduler = waiting(groups, Blocked.FULL)
        name = f"{WAITING} waiting in {groups} groups"
        between = partial(step, scheduler)
        yield f"schedule(), slots taken, {name}", median(scheduler.schedule, REPEATS, between)
        yield f"upcoming_adapters(), {name}", median(partial(look_ahead, scheduler), REPEATS, between)
    scheduler = waiting(1024, Blocked.LOADING)
    name = f"{WAITING} waiting in 1024 groups"
    yield f"schedule(), adapters being read, {name}", median(scheduler.schedule, REPEATS, lambda: step(scheduler))
    scheduler = waiting(1024, Blocked.FULL)
    leaving = iter(scheduler.waiting)
    gone: list[SequenceState] = [next(leaving) for _ in range(REPEATS + 2)]
    yield f"finish(), {name}", median(lambda: scheduler.finish(gone.pop()), REPEATS, lambda: step(scheduler))


def decoding(rows: int = 256) -> Iterator[tuple[str, float]]:
    """Seconds of planning a step of so many decoding rows, by row."""
    scheduler = Scheduler(
        BlockManager(65536, BLOCK), Slots(Blocked.FULL), max_num_seqs=rows, max_num_batched_tokens=8192
    )
    for number in range(rows):
        scheduler.add(sequence(range(8), share_group=f"group-{number % 64}"))
    step(scheduler)
    yield f"schedule() and computed(), {rows} rows decode, a row", median(lambda: step(scheduler), REPEATS * 3) / rows


def tables() -> Iterator[tuple[str, float]]:
    """Seconds of the block tables of a step in which a row has left and one like it has come, or one has grown.

    Alone, and with the copy into what a captured decode step reads (of a CPU here: to memory, and it is waited for).
    """
    torch.set_num_threads(1)  # waiting for other threads is no work
    for rows, tokens in ((256, 8192), (64, 131072)):
        yield from _tables(rows, tokens)


def _tables(rows: int, tokens: int) -> Iterator[tuple[str, float]]:
    blocks = tokens // BLOCK
    held = [list(range(row * blocks, (row + 1) * blocks)) for row in range(rows)]
    kept = BlockTables()
    kept.update(list(held))
    places = itertools.cycle(range(rows))

    def swap() -> None:
        at = next(places)
        left, held[at] = held[at], list(held[at])
        left.clear()

    def update() -> None:
        kept.update(list(held))

    graphs = _graphs(rows, tokens)
    numbers = np.arange(rows)

    def fill() -> None:
        graphs._fill(rows, Batch(numbers, numbers, numbers, numbers, kept.update(list(held))))

    name = f"{rows} rows of {tokens} tokens"
    for what, work in (("block tables", update), ("block tables of a captured step", fill)):
        yield f"{what}, a row leaves and one joins, {name}", median(work, REPEATS, swap)
        yield f"{what}, a row has grown, {name}", median(work, REPEATS, lambda: held[0].append(5))


def _graphs(rows: int, tokens: int) -> DecodeGraphs:
    """The buffer of captured steps of so many rows, with nothing behind it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": tokens}
    spec = ModelSpec.from_config({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes, **heads})
    decoder = Decoder(spec, dtype=torch.float32, device=torch.device("cpu"))
    nothing: Any = None  # neither adapters nor a device to capture on
    cache = KVCache.allocate(spec, 1, BLOCK)
    return DecodeGraphs(decoder, cache, nothing, nothing, max_rows=rows, max_context=tokens + BLOCK * 100)


CASES: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
    "planning": planning,
    "decoding": decoding,
    "tables": tables,
}
