"""Training streams of several adapters for the tests of the layers, and a whole pass over one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.choice import layer_pass
from tenora.model.executors.layers import Keep
from tenora.model.readouts.tokens import TokenReadout
from tenora.model.spec import target_modules
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments
from tests.support.tiny import VOCAB

T = TypeVar("T")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS: list[dict[str, int]] = [
    dict.fromkeys(ALL, 16),
    {"v_proj": 3, "down_proj": 8, "up_proj": 1},
    dict.fromkeys(ALL, 5),
]
SCALES = [2.0, 0.5, 1.25]


@dataclass
class Part:
    """Rows of one slot; `shared`: how many first tokens the rows have in common and compute once, as row 0 does."""

    slot: int
    rows: list[Tensor]
    shared: int = 0


def make_tables(decoder: Decoder, slots: Sequence[int] = (0, 1, 2), dtype: torch.dtype = torch.float32) -> LoraTables:
    """Adapters of RANKS, those of `slots` side by side."""
    modules = target_modules(decoder.spec)
    inputs, outputs = [m.in_features for m in modules], [m.out_features for m in modules]
    arena = torch.zeros(2**19, dtype=dtype)
    tables = LoraTables.empty(
        arena, in_features=inputs, out_features=outputs, slots=len(slots), grad=torch.zeros_like(arena)
    )
    offset = 5
    for column, slot in enumerate(slots):
        ranks = [RANKS[slot].get(module.name, 0) for module in modules]
        offset += tables.place(column, offset, ranks, [SCALES[slot]] * len(ranks)) + 1
        generator = torch.Generator().manual_seed(slot)
        for module in modules:
            for matrix in (tables.a(module.row, column), tables.bt(module.row, column)):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.1)
    return tables


def make_rows(seed: int, lengths: Sequence[int], shared: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    for row in rows:
        row[:shared] = rows[0][:shared]
    return rows


@dataclass
class Stream:
    """Parts side by side."""

    ids: Tensor
    context: ForwardContext
    predict_at: Tensor
    targets: Tensor
    coefficients: Tensor
    spans: list[slice]


def lay(decoder: Decoder, parts: Sequence[Part], tables: LoraTables | None, columns: dict[int, int]) -> Stream:
    """A stream of parts. Tokens from position 4 on that are not shared are learned, with coefficients of their own."""
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    lengths: list[int] = []
    prefixes: list[tuple[int, int] | None] = []
    of_token: list[int] = []
    at: list[Tensor] = []
    targets: list[Tensor] = []
    spans: list[slice] = []
    for part in parts:
        begin, first = sum(lengths), len(lengths)
        for number, row in enumerate(part.rows):
            skipped = part.shared if number else 0
            start = sum(lengths)
            ids.append(row[skipped:-1])
            positions.append(torch.arange(skipped, len(row) - 1))
            prefixes.append((first, skipped) if skipped else None)
            lengths.append(len(row) - 1 - skipped)
            learned = torch.arange(max(4, part.shared), len(row) - 1)
            at.append(start + learned - skipped)
            targets.append(row[learned + 1])
        spans.append(slice(begin, sum(lengths)))
        of_token += [columns.get(part.slot, -1)] * (sum(lengths) - begin)
    where = torch.cat(positions)
    whole = [length + (prefix[1] if prefix else 0) for length, prefix in zip(lengths, prefixes, strict=True)]
    context = ForwardContext(
        positions=where,
        rope=decoder.rope(where, torch.tensor(whole).repeat_interleave(torch.tensor(lengths))),
        attention=PackedAttention(list(accumulate(lengths, initial=0)), prefixes),
        lora=None if tables is None else LoraBatch(tables, build_segments(of_token)),
    )
    wanted = torch.cat(targets)
    coefficients = 0.01 + (wanted % 7).float() * 0.01
    return Stream(torch.cat(ids), context, torch.cat(at), wanted, coefficients, spans)


@dataclass
class Result:
    hidden: Tensor
    loss: Tensor
    correct: Tensor
    slopes: list[Tensor | None]
    grad: Tensor | None


def finish(items: Generator[None, None, T]) -> T:
    while True:
        try:
            next(items)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # StopIteration.value is untyped


def run(decoder: Decoder, stream: Stream, keep: Keep = Keep.ALL, *, lowest: int = 0) -> Result:
    """A whole pass; the slopes are those of every layer's input, the last one first."""
    tables = None if stream.context.lora is None else stream.context.lora.tables
    if tables is not None and tables.grad is not None:
        tables.grad.zero_()
    layers = layer_pass(decoder, stream.context, keep)
    hidden = decoder.embed(stream.ids)
    for index in range(len(decoder.layers)):
        hidden = layers.forward(index, hidden)
    coefficients = stream.coefficients.to(decoder.dtype)
    loss, correct, slope, _ = finish(
        TokenReadout(decoder).read(hidden, stream.predict_at, stream.targets, coefficients)
    )
    last, slopes = hidden.clone(), []
    if keep is not Keep.NOTHING:
        for index in reversed(range(len(decoder.layers))):
            assert slope is not None
            slope = layers.backward(index, slope, need_dx=index >= lowest)
            slopes.append(slope)
    layers.close()
    return Result(last, loss, correct, slopes, None if tables is None or tables.grad is None else tables.grad.clone())
