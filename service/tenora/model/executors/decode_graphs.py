"""Decode steps of a GPU as CUDA graphs: a few batch sizes, captured at the start, replayed with whatever runs.

A step with one new token per sequence is some hundreds of launches; replayed as a graph they cost the host one. What
changes from step to step lies in one buffer that is filled by one copy. Steps are padded to the next size: padding has
no context, so attention gives it zeros, and a negative KV slot, so that nothing of it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tenora.model.attention import paged_attention
from tenora.model.cache import KVCache
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import AdapterRows
from tenora.model.executors.base import Batch
from tenora_kernels.layout import BASE

_PADDING = (0, 0, -1, 0, BASE)  # of token, position, KV slot, context and adapter
_ALIGNED = 4  # int32 numbers: every field begins at a multiple of 16 bytes, for which kernels are compiled


class Captured(Protocol):
    """Work that can be done again.

    Attributes:
        output: what it returned, always in the same place.
    """

    output: Tensor

    def replay(self) -> None:
        """Do it again on what its inputs now hold, and write `output`."""
        ...


Capture = Callable[[Callable[[], Tensor]], Captured]
"""Records work, which is done once or more before it returns; the seam between the buffers here and CUDA."""


class CudaCapture:
    """Captures CUDA graphs that share their memory: they are replayed one after the other, in any order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        """Do the work once unrecorded, which compiles kernels and gives cuBLAS its workspace there; then record it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Calls of other threads do not end the capture: the one that reads adapters pins memory at any time.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = work()
        return _CudaGraph(graph, output)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()


class _Inputs(NamedTuple):
    """What a graph reads, int32 on the device: five numbers per row, and the block tables [rows, max_blocks]."""

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    contexts: Tensor
    adapters: Tensor
    block_tables: Tensor


class DecodeGraphs:
    """Hidden states of decode steps, by replaying what was captured once per batch size.

    Every size has a graph for the bare base, which no adapter makes dearer, and one per bound of the rows' ranks: an
    adapter of high rank costs only the steps that it takes part in. Steps with scales or bottlenecks have graphs of
    their own, captured when the first such step comes.

    Attributes:
        lora: the adapters of the rows, for steps that are not decode steps, too.
        sizes: rows that steps are padded to, ascending.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        lora: AdapterRows,
        capture: Capture,
        *,
        max_rows: int,
        max_context: int,
    ) -> None:
        """Allocate the buffer.

        Args:
            decoder: the base.
            cache: its blocks.
            lora: the adapters of the rows.
            capture: how work is recorded.
            max_rows: most sequences of a step.
            max_context: most tokens of a sequence.
        """
        self.lora = lora
        self.sizes = decode_sizes(max_rows)
        self._decoder, self._cache, self._capture = decoder, cache, capture
        self._blocks = -(-max_context // cache.block_size)
        self._buffer = torch.zeros(
            (len(_PADDING) + self._blocks) * _stride(max_rows), dtype=torch.int32, device=decoder.device
        )
        # The frequencies of a rope that depends on the length are found on the host: it is computed before the replay.
        self._rope: tuple[Tensor, Tensor] | None = None
        if decoder.rotary.depends_on_length:
            shape = (max_rows, decoder.spec.head_dim)
            zeros = (torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
            self._rope = (next(zeros), next(zeros))
        self._graphs: dict[tuple[int, int, int], Captured] = {}

    @torch.no_grad()
    def warm_up(self) -> None:
        """Capture everything, the largest first, so that the others find their memory in the pool."""
        for rows in reversed(self.sizes):
            for max_rank in (*reversed(self.lora.bounds), 0):
                self._fill(rows, _NOTHING)
                self._graph(rows, max_rank, 0)

    @torch.no_grad()
    def run(self, step: Batch) -> Tensor:
        """Hidden states [n, H] of a step, valid until the next call. ValueError beyond `sizes[-1]` rows."""
        count = len(step.positions)
        if count > self.sizes[-1]:
            raise ValueError(f"{count} rows do not fit graphs for {self.sizes[-1]}.")
        rows = next(size for size in self.sizes if size >= count)
        self._fill(rows, step)
        graph = self._graph(rows, self.lora.bound(step.adapters), self.lora.flags(step.adapters))
        graph.replay()
        return graph.output[:count]

    def _fill(self, rows: int, step: Batch) -> None:
        """Bring a step to the device, padded to `rows`: one copy, which nobody waits for.

        Tables lie with the blocks of one place side by side. Those that no sequence has come last and are not copied.
        """
        count, width = len(step.positions), min(step.block_tables.shape[1], self._blocks)
        fields = len(_PADDING)
        # Pinned anew each time: torch keeps it until the copy is done, and has it ready for the step after.
        pinned = self._buffer.is_cuda
        host = torch.empty(fields + width, _stride(rows), dtype=torch.int32, pin_memory=pinned)
        values = host.numpy()
        values[:fields] = np.array(_PADDING)[:, None]
        values[fields:, count:] = 0
        per_row = (step.token_ids, step.positions, step.kv_slots, step.positions + 1, step.adapters)
        for field, numbers in enumerate(per_row):
            values[field, :count] = numbers
        values[fields:, :count] = step.block_tables[:, :width].T
        self._buffer[: host.numel()].copy_(host.view(-1), non_blocking=True)
        if self._rope is not None and step.lengths is not None:
            tables = self._decoder.rope(self._inputs(rows).positions[:count].long(), torch.from_numpy(step.lengths))
            for kept, table in zip(self._rope, tables, strict=True):
                kept[:count] = table

    def _inputs(self, rows: int) -> _Inputs:
        table = self._buffer[: (len(_PADDING) + self._blocks) * _stride(rows)].view(-1, _stride(rows))
        token_ids, positions, kv_slots, contexts, adapters = table[: len(_PADDING), :rows].unbind()
        block_tables = table[len(_PADDING) :, :rows].t()
        return _Inputs(token_ids, positions, kv_slots, contexts, adapters, block_tables)

    def _graph(self, rows: int, max_rank: int, flags: int) -> Captured:
        """The graph of a size, a bound and what follows products and blocks; captured now if nobody warmed up.

        Its inputs must have been filled.
        """
        key = (rows, max_rank, flags)
        if key not in self._graphs:
            self._graphs[key] = self._capture(lambda: self._forward(rows, max_rank, flags))
        return self._graphs[key]

    def _forward(self, rows: int, max_rank: int, flags: int) -> Tensor:
        """What is captured; without adapters if the bound is 0."""
        inputs = self._inputs(rows)
        lora = self.lora.batch(inputs.adapters, max_rank=max_rank, flags=flags) if max_rank else None
        positions = inputs.positions.long()
        rope = self._decoder.rope(positions) if self._rope is None else (self._rope[0][:rows], self._rope[1][:rows])
        attention = paged_attention(self._cache, inputs.kv_slots, None, inputs.contexts, inputs.block_tables)
        hidden: Tensor = self._decoder(inputs.token_ids, ForwardContext(positions, rope, attention, lora))
        return hidden


_NONE = np.zeros(0, dtype=np.int64)
_NOTHING = Batch(_NONE, _NONE, _NONE, _NONE, np.zeros((0, 0), dtype=np.int64))


def decode_sizes(most: int) -> tuple[int, ...]:
    """Rows that decode steps are padded to: powers of two up to 8, every 8 up to 64, every 16 beyond, and `most`."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, most, 16))
    return (*(size for size in sizes if size < most), most)


def _stride(rows: int) -> int:
    """Numbers from one field to the next."""
    return -(-rows // _ALIGNED) * _ALIGNED
