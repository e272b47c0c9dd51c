"""Attention on the paged cache as it lies: rotary positions, the write of the new keys and values, and the product.

One compiled call per layer takes decode rows and prefill chunks of any number of sequences. Each item of its queue is
one key head of up to 96 rows (a row is one query and one head of the group), so that a key is read once for the group;
scores are kept relative to the largest so far (online softmax, Milakov and Gimelshein 2018), 64 positions at a time.

Blocks of positions are counted from position 0, and a row's numbers are combined in the order of the positions. A row
therefore gives the same bits alone or in a batch, as a decode row or inside a chunk, on one thread or several.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tenora_kernels.cpu.attention import paged
from tenora_kernels.cpu.attention.attention_tiles import MAX_ROWS, PANEL, PANELS
from tenora_kernels.cpu.runtime.arguments import assign
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.cpu.runtime.values import SAMPLES

__all__ = ["UNLIMITED", "AttentionPlan", "PagedStep", "Rope", "allocate_cache", "supports", "warm_up"]

_MOST_ROWS = 96  # of an item: 24 KiB of q and as much of sums stay in the second-level cache
_ALONE_WORK = 250_000  # multiply-adds of the scores; below, waking the team costs more than it gains
_ALONE = Team(1)

UNLIMITED = 1 << 40
"""The window that is none."""


class Rope(NamedTuple):
    """What rotates q and k: cos and sin [T, D] in the type of q, in the halves layout of Hugging Face's weights."""

    cos: Tensor
    sin: Tensor


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the compiled path takes heads of this type and size."""
    return dtype in SAMPLES and head_dim % 8 == 0


def allocate_cache(blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised keys and values of one layer, as views [blocks, block_size, kv_heads, dim].

    In memory the keys are [blocks, kv_heads, dim, block_size] and the values [blocks, kv_heads, block_size, dim]: a
    vector of scores is then a sum over `dim` of a number times a vector, without a sum across lanes.
    """
    # Not in huge pages: areas of a power of two bytes would then meet in the same sets of the cache (1.5 x the time).
    keys = torch.empty(blocks, kv_heads, dim, block_size, dtype=dtype).permute(0, 3, 1, 2)
    values = torch.empty(blocks, kv_heads, block_size, dim, dtype=dtype).permute(0, 2, 1, 3)
    return keys, values


class AttentionPlan(NamedTuple):
    """What `paged.attend_phases` takes for layers of one shape in one step.

    Attributes:
        items: int64 [n, 4], its queue.
        call: `paged.CALL` [1]. Sizes, workspace and writes_first are filled in; who calls fills in the addresses,
            block_size and window.
        panels: int64 [members, 3, PANELS].
        scale: of the scores.
        workspace: what `call` holds the address of.
        work: pairs of a query and a key, summed over the step.
    """

    items: NDArray[np.int64]
    call: NDArray[np.void]
    panels: NDArray[np.int64]
    scale: np.float32
    workspace: NDArray[np.float32]
    work: int


class PagedStep:
    """What the layers of one step share. Build it once per step; it holds buffers, so one thread uses it at a time.

    Args:
        kv_slots: int64 [T], the KV slot (block · block_size + offset) of each token of the step.
        query_start: [B + 1] ascending from 0 to T; sequence b's new tokens are query_start[b] … query_start[b + 1] - 1.
        context_lens: [B], tokens of each sequence including the new ones, which are its last.
        block_tables: [B, max_blocks]; entries beyond a sequence's context are not read.
        team: who computes `attend`; None is the calling thread. A small step does not wake the others.

    Attributes:
        kv_slots: int64 [T].
        tables: int32 [B, max_blocks].
    """

    def __init__(
        self,
        kv_slots: ArrayLike,
        query_start: ArrayLike,
        context_lens: ArrayLike,
        block_tables: ArrayLike,
        *,
        team: Team | None = None,
    ) -> None:
        self.kv_slots: NDArray[np.int64] = np.ascontiguousarray(kv_slots, np.int64)
        self.tables: NDArray[np.int32] = np.ascontiguousarray(block_tables, np.int32)
        starts = np.asarray(query_start, np.int64)
        self._starts, self._counts = starts[:-1], np.diff(starts)
        self._positions = np.asarray(context_lens, np.int64) - self._counts
        self._team = team or _ALONE
        self._plans: dict[tuple[int, int, int, int], AttentionPlan] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor],
        window: int | None,
        *,
        rope: Rope | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """Write k and v into the cache, then attend from every token to its own sequence, up to itself.

        Args:
            q: [T, Hq, D]; k, v: [T, Hkv, D], float32 or bfloat16. Slices of one [T, Hq + 2 Hkv, D] are read as they
                lie; other layouts are copied. Not changed.
            cache: keys and values of the layer, from `allocate_cache`, in the type of q. Changed at the step's slots.
            window: how many positions a token sees, itself included; None is all.
            rope: rotates q and k on the way; None if they are rotated already.
            norm: [Hq + Hkv, D], weights of an RMSNorm of each head of q and k before they are rotated; None for none.
            eps: of that norm.

        Returns:
            [T, Hq · D].

        Raises:
            ValueError: a tensor is of another type than q, or rope or norm do not lie whole in memory.
        """
        tokens, heads, dim = q.shape
        others = [k, v, *cache, *(rope or ()), *(() if norm is None else (norm,))]
        if q.dtype not in SAMPLES or any(other.dtype != q.dtype for other in others):
            raise ValueError(f"q, k, v, cache, rope and norm must all be float32 or all bfloat16; q is {q.dtype}.")
        if not all(table.is_contiguous() for table in others[4:]):
            raise ValueError("cos, sin and the weights of the norm must be contiguous.")
        out = torch.empty(tokens, heads * dim, dtype=q.dtype)
        if tokens == 0:
            return out
        q, k, v = _same_stride(q, k, v)
        plan, team = self.plan(heads, k.shape[1], dim, self._team), self._team
        if plan.work * heads * dim < _ALONE_WORK:
            team = _ALONE
        assign(
            plan.call,
            q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), stride=q.stride(0) * q.element_size(), out=out.data_ptr(),
            cos=0 if rope is None else rope.cos.data_ptr(), sin=0 if rope is None else rope.sin.data_ptr(),
            norm=0 if norm is None else norm.data_ptr(), keys=cache[0].data_ptr(), values=cache[1].data_ptr(),
            block_size=cache[0].shape[1], window=UNLIMITED if window is None else window,
        )  # fmt: skip
        team.run(
            paged.attend_job, paged.PHASES, plan.panels, self.kv_slots, self.tables, plan.items, plan.call, plan.scale,
            np.float32(eps), SAMPLES[q.dtype],
        )  # fmt: skip
        return out

    def plan(self, heads: int, kv_heads: int, dim: int, team: Team) -> AttentionPlan:
        """The plan for layers of this shape, made once."""
        key = (heads, kv_heads, dim, team.size)
        if key not in self._plans:
            self._plans[key] = self._make_plan(*key)
        return self._plans[key]

    def _make_plan(self, heads: int, kv_heads: int, dim: int, members: int) -> AttentionPlan:
        group = heads // kv_heads
        items, work = self._items(_queries_of_an_item(group))
        rows = int(items[:, 2].max(initial=1)) * group
        floats = paged.workspace_floats(rows, dim)
        workspace = np.empty((members, floats), np.float32)
        call = np.zeros(1, paged.CALL)
        assign(
            call,
            heads=heads, kv_heads=kv_heads, dim=dim, window=UNLIMITED, tile_rows=rows,
            # A sequence with one new token needs no other item's keys: its item writes them itself.
            writes_first=int(self._counts.max(initial=0) > 1),
            workspace=workspace.ctypes.data, workspace_step=floats * 4,
        )  # fmt: skip
        panels = np.empty((members, 3, PANELS), np.int64)
        return AttentionPlan(items, call, panels, np.float32(1 / sqrt(dim)), workspace, work)

    def _items(self, most: int) -> tuple[NDArray[np.int64], int]:
        """Runs of at most `most` queries, the longest first: [n, 4] and the number of pairs of a query and a key."""
        pieces = -(-self._counts // most)
        sequence = np.repeat(np.arange(len(pieces)), pieces)
        ordinal = np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = ordinal * most
        count = np.minimum(self._counts[sequence] - first, most)
        position = self._positions[sequence] + first
        work = (position + count) * count
        order = np.argsort(-work, kind="stable")
        items = np.stack((sequence, self._starts[sequence] + first, count, position), axis=1)[order]
        return np.ascontiguousarray(items), int(work.sum())


def _queries_of_an_item(group: int) -> int:
    """As many as make at most 96 rows, in whole steps of the inner loop where that is possible."""
    most = max(1, _MOST_ROWS // group)
    return next((count for count in range(most, 0, -1) if count * group % MAX_ROWS == 0), most)


def _same_stride(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values with rows [heads, dim] that lie whole, all with the same distance from token to token."""
    dim = q.shape[2]
    if q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (dim, 1) and q.stride(0) == k.stride(0) == v.stride(0):
        return q, k, v
    heads, kv_heads = q.shape[1], k.shape[1]
    q, k, v = torch.split(torch.cat((q, k, v), dim=1), [heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def warm_up(dtype: torch.dtype) -> None:
    """Compile for a type, or read the compiled code from the cache; later calls then start at once."""
    step = PagedStep([0, 1], [0, 2], [2], [[0]])
    q, k, v = torch.split(torch.zeros(2, 4, 8, dtype=dtype), [2, 1, 1], dim=1)
    step.attend(q, k, v, allocate_cache(1, PANEL, 1, 8, dtype), None)
