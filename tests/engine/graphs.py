"""Stand-ins for what only a GPU has, so that the buffers of `DecodeGraphs` are tested with real numbers on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.engine.core import Engine
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.executors.decode_graphs import DecodeGraphs
from tenora_kernels.flags import EPILOGUE
from tenora_kernels.gpu.configs import rank_bounds
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments


class Rerun:
    """A graph that does its work again. What it returned at the capture is all that anybody may look at."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work = work
        self.output = work().clone()

    def replay(self) -> None:
        self.output.copy_(self._work())


class HostRows:
    """`GpuLora` on the host: steps see the tables as they were at the last `refresh`."""

    def __init__(self, tables: LoraTables, max_rank: int = 256) -> None:
        self._tables = tables
        self._mirror: LoraTables | None = None
        self.broken = False
        self.bounds = rank_bounds(max_rank)
        self.refresh()

    def refresh(self) -> bool:
        if self.broken:
            raise ValueError("an adapter has rank 9; these kernels were prepared for 8.")
        given = self._tables
        copies = (table.clone() for table in (given.ranks, given.scaling, given.a_offset, given.b_offset))
        self._mirror = LoraTables(given.arena, *copies, given.in_features, given.out_features)
        self._mirror.is_bf16[:] = given.is_bf16
        self._mirror.flags[:] = given.flags
        return True

    def bound(self, slots: npt.NDArray[np.integer[Any]]) -> int:
        highest = max((int(self._tables.ranks[:, slot].max()) for slot in slots if slot >= 0), default=-1)
        return 0 if highest < 0 else next(bound for bound in self.bounds if highest <= bound)

    def flags(self, slots: npt.NDArray[np.integer[Any]]) -> int:
        return int(np.bitwise_or.reduce(self._tables.flags[slots[slots >= 0]])) & EPILOGUE

    def batch(self, slot_of_row: Tensor, *, max_rank: int | None = None, flags: int = EPILOGUE) -> LoraBatch:
        assert self._mirror is not None
        assert not flags & ~EPILOGUE
        assert max_rank in self.bounds
        assert slot_of_row.dtype in {torch.int32, torch.int64}
        return LoraBatch(self._mirror, build_segments(slot_of_row))


def with_graphs(engine: Engine, *, capture: Callable[[Callable[[], Tensor]], Rerun] = Rerun) -> DecodeGraphs:
    """Give an engine on the CPU what `executor_for` gives one on a GPU."""
    runner = engine.runner
    graphs = DecodeGraphs(
        runner.decoder,
        runner.cache,
        HostRows(engine.pool.tables),
        capture,
        max_rows=engine.scheduler.max_num_seqs,
        max_context=engine.max_model_len,
    )
    runner.executor = GraphExecutor(runner.decoder, runner.cache, graphs)
    return graphs
