"""How a training stream lies: its sequences, the rows of each adapter, and what the compiled layers read about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tenora_kernels.cpu.attention.sequences import QUERIES, SEQUENCE, score_columns
from tenora_kernels.cpu.lowrank import factors
from tenora_kernels.cpu.products.strided import WIDTH
from tenora_kernels.cpu.runtime.arguments import assign
from tenora_kernels.cpu.runtime.vectors import LANES
from tenora_kernels.layout import LoraBatch, LoraSite

__all__ = ["Rows", "Sequences", "lay_out_rows", "lay_out_sequences"]

Integers = NDArray[np.int64]

PIECE_ROWS = 24
"""Rows of one small task: whole tiles, and enough tasks to share."""


class Sequences(NamedTuple):
    """Sequences of a stream, for `sequences`.

    Attributes:
        table: SEQUENCE [n].
        items: int64 [items, 3], the longest first.
        places: int64 [T].
        members, families: int64; see `layer_backward.backward_layer`. The largest family comes first.
        panels: of all keys.
        score_columns: of a block of scores.
    """

    table: NDArray[np.void]
    items: Integers
    places: Integers
    members: Integers
    families: Integers
    panels: int
    score_columns: int


class Rows(NamedTuple):
    """Rows of a stream and their adapters, for `factors`.

    Attributes:
        pieces, runs, bounds, slots, sites: int64 arrays as the jobs take them.
        offsets: int64 [slots, sites + modules], where each packed matrix lies, in floats from the start of the packs.
        packed: floats of all packs.
        columns: of S.
    """

    pieces: Integers
    runs: Integers
    bounds: Integers
    slots: Integers
    sites: Integers
    offsets: Integers
    packed: int
    columns: int


def lay_out_sequences(cu_seqlens: Sequence[int], prefixes: Sequence[tuple[int, int] | None] | None) -> Sequences:
    """Describe the sequences of a stream.

    Args:
        cu_seqlens: [n + 1], where each one begins; the last entry is T.
        prefixes: per sequence None, or (another sequence a, m): it sees the first m tokens of a before its own, and a
            has no prefix itself.

    Raises:
        ValueError: a prefix is not what it may be.
    """
    starts = np.asarray(cu_seqlens, np.int64)
    counts = np.diff(starts)
    table = np.zeros(len(counts), SEQUENCE)
    panels = -(-counts // WIDTH)
    assign(table, start=starts[:-1], count=counts, panel=np.cumsum(panels) - panels, shared=-1)
    for number, prefix in enumerate(prefixes or ()):
        if prefix is not None and prefix[1] > 0:
            owner, shared = prefix
            if (
                not (0 <= owner < len(counts))
                or owner == number
                or shared > counts[owner]
                or table["shared"][owner] >= 0
            ):
                raise ValueError(f"sequence {number} cannot begin with {shared} tokens of sequence {owner}.")
            assign(table[number], shared=owner, shared_count=shared)
    sharing = table["shared"] >= 0
    if sharing[table["shared"][sharing]].any():
        raise ValueError("a sequence whose beginning others share cannot share another one's.")
    heads = np.where(sharing, table["shared"], np.arange(len(counts)))  # who each one's family is named after
    order = np.lexsort((np.arange(len(counts)), sharing, heads))  # the one that is shared comes first
    found, first = np.unique(heads[order], return_index=True)
    groups = np.split(order, first[1:]) if len(found) else []
    work = counts * (counts + 2 * table["shared_count"])
    groups.sort(key=lambda group: -int(work[group].sum()))
    families = np.cumsum([0, *(len(group) for group in groups)])
    position = np.arange(int(starts[-1])) - np.repeat(starts[:-1], counts)
    columns = [
        score_columns(int(count), int(shared)) for count, shared in zip(counts, table["shared_count"], strict=True)
    ]
    return Sequences(
        table=table,
        items=_items(counts, table["shared_count"]),
        places=np.repeat(table["panel"] * WIDTH, counts) + position,
        members=np.ascontiguousarray(np.concatenate(groups) if groups else order, np.int64),
        families=families.astype(np.int64),
        panels=int(panels.sum()),
        score_columns=max(columns, default=WIDTH),
    )


def _items(counts: Integers, shared: Integers) -> Integers:
    """Blocks of at most QUERIES queries: int64 [n, 3] of sequence, first token and number of tokens."""
    blocks = -(-counts // QUERIES)
    sequence = np.repeat(np.arange(len(counts)), blocks)
    first = (np.arange(len(sequence)) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * QUERIES
    size = np.minimum(counts[sequence] - first, QUERIES)
    work = (shared[sequence] + first + size) * size
    return np.ascontiguousarray(np.stack((sequence, first, size), axis=1)[np.argsort(-work, kind="stable")])


def lay_out_rows(rows: int, lora: LoraBatch | None, of_layer: Sequence[LoraSite], layers: int) -> Rows:
    """Describe whose rows are whose.

    Args:
        rows: T.
        lora: tables and segments; None if every row is the base's.
        of_layer: the first layer's sites.
        layers: of the decoder.
    """
    slot_of_row = np.full(rows, -1, np.int64)
    slots: Integers = np.zeros(0, np.int64)
    sites = factors.site_table(of_layer)
    modules = int(sites[:, factors.COUNT].sum())
    ranks = np.zeros((modules, 0), np.int64)
    if lora is not None:
        perm, ends, slots = (np.ascontiguousarray(part, np.int64) for part in lora.segments.arrays)
        slot_of_row[perm] = np.repeat(slots, np.diff(ends))
        slots = np.sort(slots)
        # The largest rank of any layer: places are the same in all of them.
        of_modules = lora.tables.arrays.ranks[: layers * modules, slots]
        ranks = of_modules.reshape(-1, modules, len(slots)).max(axis=0).astype(np.int64)
    whole = -(-ranks // LANES) * LANES
    offsets = np.zeros((len(slots), len(sites) + modules), np.int64)
    columns, packed = 0, np.int64(0)
    sizes = []
    for site in sites:
        of_site = whole[site[factors.MODULE] : site[factors.MODULE] + site[factors.COUNT]].sum(axis=0)
        site[factors.S_COLUMN] = columns
        columns += int(of_site.max(initial=0))
        sizes.append(of_site * site[factors.DEPTH])
    outputs = [stop - start for site in of_layer for start, stop in site.slices]
    sizes += [ranks_of * width for ranks_of, width in zip(whole, outputs, strict=True)]
    if len(slots):
        flat = np.stack(sizes, axis=1)
        offsets = (np.cumsum(flat) - flat.ravel()).reshape(flat.shape)
        packed = flat.sum()
    runs = _runs(slot_of_row)
    adapted = runs[runs[:, 0] >= 0]
    adapted = adapted[np.argsort(adapted[:, 0], kind="stable")]
    bounds = np.append(np.searchsorted(adapted[:, 0], slots), len(adapted))
    return Rows(
        pieces=_pieces(runs, slots),
        runs=np.ascontiguousarray(adapted),
        bounds=bounds.astype(np.int64),
        slots=slots,
        sites=sites,
        offsets=offsets,
        packed=int(packed),
        columns=columns,
    )


def _runs(slot_of_row: Integers) -> Integers:
    """Rows of one slot that follow each other: int64 [n, 3] of slot, first row and number of rows."""
    starts = np.flatnonzero(np.diff(slot_of_row, prepend=-2))
    lengths = np.diff(np.append(starts, len(slot_of_row)))
    return np.stack((slot_of_row[starts], starts, lengths), axis=1).astype(np.int64)


def _pieces(runs: Integers, slots: Integers) -> Integers:
    """Runs cut into at most PIECE_ROWS rows: int64 [n, 4] of slot, first row, rows and number of the slot."""
    counts = -(-runs[:, 2] // PIECE_ROWS)
    run = np.repeat(np.arange(len(runs)), counts)
    inside = (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * PIECE_ROWS
    size = np.minimum(runs[run, 2] - inside, PIECE_ROWS)
    slot = runs[run, 0]
    number = np.searchsorted(slots, slot)
    return np.ascontiguousarray(np.stack((slot, runs[run, 1] + inside, size, number), axis=1).astype(np.int64))
