"""Attention of one new token per sequence to its keys and values, read in place through block tables.

Flash-decoding (Dao et al. 2023): the keys of a sequence are shared out over *splits*, each of which leaves the largest
score, the sum of the weights and the weighted sum of the values; a second launch combines them. How a sequence is
split follows from its own length, never from the batch, and splits are combined in a fixed order: a row has the same
bits in every batch, beside any padding, and in a graph that was captured for other lengths.
"""

from __future__ import annotations

import triton.language as tl

from tenora_kernels.gpu.primitives import dot_low, jit


@jit()
def _share(
    context: tl.tensor, window: tl.tensor, keys: tl.constexpr, limit: tl.constexpr, bn: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(first key that is seen, keys per split, splits) of a context; no splits if it is empty.

    `keys` per split, or more (whole blocks of bn) where there would be more than `limit` splits.
    """
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    seen = context - first
    size = tl.maximum(tl.cdiv(tl.cdiv(seen, limit), bn) * bn, keys)
    return first, size, tl.cdiv(seen, size)


@jit("table_row", "table_block", "window")
def paged_decode(
    out: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    table_row: tl.tensor,
    table_block: tl.tensor,
    q_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    dim: tl.constexpr,
    block_size: tl.constexpr,
    keys: tl.constexpr,
    limit: tl.constexpr,
    bm: tl.constexpr,
    bn: tl.constexpr,
    bd: tl.constexpr,
    cast: tl.constexpr,
) -> None:
    """Splits of one row and one key head: all the query heads of the group at once, rows of one product.

    Grid: (programs per row, key heads, rows). Program i takes splits i, i + programs, …; so their number may be any,
    and those for which a context has no split end at once. A single split writes the result itself. A row whose
    context is 0 (padding) is 0.

    Args:
        out: [rows, heads, dim], written, in the type of q.
        sums: float32 [rows, heads, limit, dim], written where there are several splits: Σ weight · value.
        tops: float32 [rows, heads, limit], likewise: the largest score, in powers of 2.
        totals: float32 [rows, heads, limit], likewise: Σ weight.
        q: [rows, heads, dim], rows q_stride apart.
        k, v: [blocks, block_size, heads / group, dim], contiguous; only keys of a context are read.
        tables: int32; block j of a row is at row · table_row + j · table_block.
        contexts: int32 [rows], the new token included.
        window: how many keys a token sees, itself included; 0 is all.
        scale: of the scores, for powers of 2: log2(e) / √dim.
        keys: fewest keys of a split, unless it is the last one.
        limit: most splits of a context, a power of two.
        bm: a power of two not below `group`.
        bn: keys per step.
        bd: a power of two not below `dim`.
        cast: as in `dot_low`.
    """
    row = tl.program_id(2)
    kv_head = tl.program_id(1)
    context = tl.load(contexts + row)
    first, size, splits = _share(context, window, keys, limit, bn)
    g = tl.arange(0, bm)
    d = tl.arange(0, bd)
    inside = d < dim
    real = (g < group)[:, None] & inside[None, :]
    head = row.to(tl.int64) * heads + kv_head * group + g
    at_out = head[:, None] * dim + d[None, :]
    if (splits == 0) & (tl.program_id(0) == 0):
        tl.store(out + at_out, tl.zeros([bm, bd], out.dtype.element_ty), mask=real)
    if tl.program_id(0) < splits:
        q_rows = q + row.to(tl.int64) * q_stride + (kv_head * group + g)[:, None] * dim
        query = tl.load(q_rows + d[None, :], mask=real, other=0.0)
        for split in range(tl.program_id(0), splits, tl.num_programs(0)):
            begin = first + split * size
            end = tl.minimum(begin + size, context)
            top = tl.full([bm], float("-inf"), tl.float32)
            total = tl.zeros([bm], tl.float32)
            acc = tl.zeros([bm, bd], tl.float32)
            for start in range(begin, end, bn):
                position = start + tl.arange(0, bn)
                live = position < end
                block = tl.load(tables + row * table_row + position // block_size * table_block, mask=live, other=0)
                slot = block.to(tl.int64) * block_size + position % block_size
                at = (slot * (heads // group) + kv_head)[:, None] * dim + d[None, :]
                there = live[:, None] & inside[None, :]
                key = tl.load(k + at, mask=there, other=0.0)
                score = dot_low(query, tl.trans(key), tl.zeros([bm, bn], tl.float32), cast) * scale
                score = tl.where(live[None, :], score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, axis=1))
                shrunk = tl.exp2(top - higher)
                weight = tl.exp2(score - higher[:, None])
                value = tl.load(v + at, mask=there, other=0.0)
                total = total * shrunk + tl.sum(weight, axis=1)
                acc = dot_low(weight.to(value.dtype), value, acc * shrunk[:, None], cast)
                top = higher
            if splits == 1:
                tl.store(out + at_out, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
            else:
                part = head * limit + split
                tl.store(sums + part[:, None] * dim + d[None, :], acc, mask=real)
                tl.store(tops + part, top, mask=g < group)
                tl.store(totals + part, total, mask=g < group)


@jit("window")
def combine_decode(
    out: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    contexts: tl.tensor,
    window: tl.tensor,
    heads: tl.constexpr,
    dim: tl.constexpr,
    keys: tl.constexpr,
    limit: tl.constexpr,
    bn: tl.constexpr,
    bd: tl.constexpr,
) -> None:
    """Combine what `paged_decode` left of the rows that have several splits. Grid: (heads, rows).

    All `limit` places are added in one fixed order, those beyond the splits as zeros. Arguments as there.
    """
    row = tl.program_id(1)
    _, _, splits = _share(tl.load(contexts + row), window, keys, limit, bn)
    if splits > 1:
        head = row.to(tl.int64) * heads + tl.program_id(0)
        split = tl.arange(0, limit)
        part = head * limit + split
        d = tl.arange(0, bd)
        there = split < splits
        top = tl.load(tops + part, mask=there, other=float("-inf"))
        weight = tl.exp2(top - tl.max(top, axis=0))
        total = tl.sum(tl.load(totals + part, mask=there, other=0.0) * weight, axis=0)
        mask = there[:, None] & (d < dim)[None, :]
        acc = tl.load(sums + part[:, None] * dim + d[None, :], mask=mask, other=0.0)
        result = tl.sum(acc * weight[:, None], axis=0) / total
        tl.store(out + head * dim + d, result.to(out.dtype.element_ty), mask=d < dim)


@jit()
def write_pages(
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    kv_slots: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Store the keys and values of each row at its slot; a row whose slot is negative (padding) is left out.

    Grid: (rows).

    Args:
        k_cache, v_cache: [slots, size], contiguous.
        kv_slots: int [rows].
        k, v: [rows, size], rows k_stride and v_stride apart.
        block: a power of two not below `size`.
    """
    row = tl.program_id(0)
    slot = tl.load(kv_slots + row).to(tl.int64)
    if slot >= 0:
        n = tl.arange(0, block)
        inside = n < size
        tl.store(k_cache + slot * size + n, tl.load(k + row.to(tl.int64) * k_stride + n, mask=inside), mask=inside)
        tl.store(v_cache + slot * size + n, tl.load(v + row.to(tl.int64) * v_stride + n, mask=inside), mask=inside)
