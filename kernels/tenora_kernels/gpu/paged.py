"""Launches of paged decode attention. Nothing here waits for the device; all of it may be captured in a CUDA graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenora_kernels.gpu import configs
from tenora_kernels.gpu.launch import on
from tenora_kernels.gpu.paged_kernel import combine_decode, paged_decode
from tenora_kernels.gpu.paged_kernel import write_pages as write_kernel

_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))


def write_pages(keys: Tensor, values: Tensor, kv_slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store one layer's new keys and values in its cache. One launch.

    Args:
        keys, values: [blocks, block_size, Hkv, D], contiguous; changed in place.
        kv_slots: int32 or int64 [rows], block · block_size + offset; a negative one (padding) stores nothing.
        k, v: [rows, Hkv, D], in the type of the cache.
    """
    rows, size = k.shape[0], keys.shape[2] * keys.shape[3]
    if rows == 0:
        return
    k, v = _rows(k), _rows(v)
    block = _power_of_two(size)
    with on(k):
        write_kernel[(rows,)](keys, values, kv_slots, k, v, k.stride(0), v.stride(0), size=size, block=block)


def attend_pages(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, window: int | None
) -> Tensor:
    """Attention of one new token per row to the keys of its context, the last of which is its own. One or two launches.

    The grid follows from the shapes alone. Scratch memory comes from torch's allocator: inside a CUDA graph from the
    graph's own pool, at addresses that every replay uses again.

    Args:
        q: [rows, Hq, D] in bf16, fp16 or float32, rotated. Query head h reads key head h // (Hq / Hkv).
        keys, values: [blocks, block_size, Hkv, D], contiguous, in the type of q.
        tables: int32 [rows, width] with any strides: the blocks of each row. Entries behind a context are not read.
        contexts: int32 [rows], keys of each row, not more than width · block_size; 0 (padding) gives zeros.
        window: how many keys a token sees, itself included; None is all.

    Returns:
        [rows, Hq · D] in the type of q. A row's bits depend on its own query, keys and context only.

    Raises:
        TypeError: for another type, or if the types differ.
    """
    if q.dtype not in _DTYPES or not q.dtype == keys.dtype == values.dtype:
        raise TypeError(f"no GPU kernel for q in {q.dtype} and a cache in {keys.dtype} and {values.dtype}.")
    rows, heads, dim = q.shape
    out = q.new_empty(rows, heads * dim)
    if rows == 0:
        return out
    q = _rows(q)
    _, block_size, kv_heads, _ = keys.shape
    tiles = configs.paged_tiles(heads // kv_heads, dim, q.dtype, configs.arch_of(q.device))
    most = min(configs.MAX_SPLITS, max(1, -(-tables.shape[1] * block_size // configs.SPLIT_KEYS)))
    parts = rows * heads * configs.MAX_SPLITS if most > 1 else 0
    sums = torch.empty(parts * dim, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, parts, dtype=torch.float32, device=q.device)
    seen = window or 0
    shared = {
        "heads": heads,
        "dim": dim,
        "keys": configs.SPLIT_KEYS,
        "limit": configs.MAX_SPLITS,
        "bn": tiles.bn,
        "bd": tiles.bk,
    }
    with on(q):
        paged_decode[(configs.programs_per_row(most, rows * kv_heads), kv_heads, rows)](
            out,
            sums,
            tops,
            totals,
            q,
            keys,
            values,
            tables,
            contexts,
            tables.stride(0),
            tables.stride(1),
            q.stride(0),
            seen,
            scale=math.log2(math.e) / math.sqrt(dim),
            group=heads // kv_heads,
            block_size=block_size,
            bm=tiles.bm,
            cast=configs.interpreted(q.device),
            **shared,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if most > 1:
            combine_decode[(heads, rows)](out, sums, tops, totals, contexts, seen, **shared, num_warps=4)
    return out


def _rows(x: Tensor) -> Tensor:
    """x [rows, heads, D] with whole rows; a slice of a fused projection has them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
