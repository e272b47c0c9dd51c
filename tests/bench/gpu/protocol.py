"""What is measured: shapes, ranks and distributions of adapters over rows. No tensors; checked without a GPU."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

DISTRIBUTIONS = ("distinct", "uniform", "zipf", "identical")
DECODE_ROWS = (1, 8, 32, 64, 128, 256)
PREFILL_ROWS = (512, 2048, 8192)


@dataclass(frozen=True)
class Group:
    """One projection group: modules that share x."""

    model: str
    name: str
    inputs: int
    outputs: tuple[int, ...]


GROUPS = (
    Group("SmolLM2-135M", "qkv", 576, (576, 192, 192)),
    Group("SmolLM2-135M", "gate_up", 576, (1536, 1536)),
    Group("Qwen3-0.6B", "qkv", 1024, (2048, 1024, 1024)),
    Group("Qwen3-0.6B", "gate_up", 1024, (3072, 3072)),
    Group("Llama-3-8B", "qkv", 4096, (4096, 1024, 1024)),
    Group("Llama-3-8B", "o", 4096, (4096,)),
    Group("Llama-3-8B", "gate_up", 4096, (14336, 14336)),
    Group("Llama-3-8B", "down", 14336, (4096,)),
)
LLAMA = GROUPS[4:]

RANKS: dict[str, tuple[int, ...]] = {"16": (16,), "64": (64,), "8-64": (8, 16, 32, 64)}
"""Ranks of the adapters, in turn. "16+64": all 16, in a pool that also holds an adapter of rank 64 that no row uses."""


@dataclass(frozen=True)
class Measurement:
    """One case.

    Attributes:
        group: the projection group.
        rows: T.
        ranks: a key of `RANKS`, or "16+64".
        distribution: of adapters over rows; "prefill+decode": one adapter for all rows but the last 64.
        base_share: share of rows without an adapter.
        partial: adapters leave out every module but the first.
    """

    group: Group
    rows: int
    ranks: str = "16"
    distribution: str = "distinct"
    base_share: float = 0.0
    partial: bool = False

    @property
    def name(self) -> str:
        extra = f", {self.base_share:.0%} base" if self.base_share else ""
        extra += ", partial" if self.partial else ""
        return f"{self.group.model} {self.group.name} T={self.rows} r={self.ranks} {self.distribution}{extra}"

    def slots(self) -> list[int]:
        """The slot of each row, -1 for the base; the same at every call."""
        generator = random.Random(self.rows)
        if self.distribution == "prefill+decode":
            slots = [0] * (self.rows - 64) + list(range(1, 65))
        else:
            slots = spread(self.distribution, self.rows, generator)
        for t in generator.sample(range(self.rows), round(self.base_share * self.rows)):
            slots[t] = -1
        return slots

    def rank_of(self, slot: int) -> int:
        """Rank of the adapter in a slot; the slot behind the last one used is the pool's odd one."""
        turns = RANKS.get(self.ranks, (16,))
        return 64 if self.ranks == "16+64" and slot == max(self.slots()) + 1 else turns[slot % len(turns)]

    def module_ranks(self, slot: int) -> tuple[int, ...]:
        """Rank of every module of the adapter in a slot."""
        rank = self.rank_of(slot)
        return tuple(0 if self.partial and j else rank for j in range(len(self.group.outputs)))

    def pool(self) -> int:
        """Slots in the pool."""
        return max(self.slots()) + 1 + (self.ranks == "16+64")

    def true_bytes(self) -> int:
        """Bytes of 2-byte weights that the rows' adapters have at their true ranks, each counted once."""
        used = {slot for slot in self.slots() if slot >= 0}
        return sum(
            2 * rank * (self.group.inputs + out)
            for slot in used
            for rank, out in zip(self.module_ranks(slot), self.group.outputs, strict=True)
        )


def spread(distribution: str, rows: int, generator: random.Random) -> list[int]:
    """Adapters of `rows` rows as in Punica: all distinct, √n evenly, Zipf-1.5, or one; shuffled, slots from 0 on."""
    if distribution == "distinct":
        drawn = list(range(rows))
    elif distribution == "uniform":
        drawn = [t % math.ceil(math.sqrt(rows)) for t in range(rows)]
    elif distribution == "zipf":
        weights = [1 / (i + 1) ** 1.5 for i in range(rows)]
        drawn = generator.choices(range(rows), weights, k=rows)
    elif distribution == "identical":
        drawn = [0] * rows
    else:
        raise ValueError(f"no distribution is called {distribution!r}.")
    generator.shuffle(drawn)
    names = {slot: i for i, slot in enumerate(dict.fromkeys(drawn))}
    return [names[slot] for slot in drawn]


def decode_cases() -> Iterator[Measurement]:
    """Small batches: every distribution at 32 rows first, then the other numbers of rows."""
    for rows in sorted(DECODE_ROWS, key=lambda count: count != 32):
        for group in LLAMA:
            for distribution in DISTRIBUTIONS[: 1 if rows == 1 else None]:
                yield Measurement(group, rows, distribution=distribution)
    for group in (LLAMA[0], LLAMA[2]):
        for rows in (32, 128):
            for ranks in ("64", "8-64", "16+64"):
                yield Measurement(group, rows, ranks)
            yield Measurement(group, rows, base_share=0.25)
            yield Measurement(group, rows, partial=True)
    for group in GROUPS[:4]:
        for rows in (1, 32, 256):
            yield Measurement(group, rows)


def prefill_cases() -> Iterator[Measurement]:
    """Large batches: a few sequences, each with an adapter."""
    for group in (GROUPS[1], GROUPS[3], *LLAMA):
        for rows in PREFILL_ROWS:
            yield Measurement(group, rows, distribution="identical")
        yield Measurement(group, 2048 + 64, distribution="prefill+decode")
    for ranks in ("64", "8-64"):
        yield Measurement(LLAMA[0], 2048, ranks, "identical")
