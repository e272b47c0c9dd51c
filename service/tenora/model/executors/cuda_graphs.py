"""Steps on a GPU: those with one new token per sequence are replayed as graphs, the others launched one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import DeviceAdapters
from tenora.model.executors.base import Batch
from tenora.model.executors.decode_graphs import DecodeGraphs
from tenora.model.executors.modules import ModulesExecutor

__all__ = ["GraphExecutor"]

_FEW_ROWS = 256  # steps of up to so many tokens, and those of more, take other kernels on a GPU


class GraphExecutor:
    """See `Executor`. Nothing of a step waits for the GPU until its tokens are read.

    Attributes:
        graphs: of the steps that only decode.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, graphs: DecodeGraphs) -> None:
        self.graphs = graphs
        self._launched = ModulesExecutor(decoder, cache, DeviceAdapters(graphs.lora, decoder.device))
        self._longest = min(decoder.spec.context_length, cache.num_blocks * cache.block_size)

    def run(self, batch: Batch) -> Tensor:
        """See `Executor`. The only choice that a step's shape decides."""
        self.graphs.lora.refresh()
        if batch.decodes and batch.tokens <= self.graphs.sizes[-1]:
            return self.graphs.run(batch)
        return self._launched.run(batch)

    def states(self, batch: Batch, layers: Sequence[int]) -> Sequence[Tensor]:
        """See `Executor`. Never a graph: none keeps what lies below the final norm."""
        self.graphs.lora.refresh()
        return self._launched.states(batch, layers)

    def warm_up(self, max_tokens: int) -> tuple[int, ...]:
        """See `Executor`: every graph is captured; prompts of two lengths compile the kernels for chunks."""
        self.graphs.warm_up()
        most = min(max_tokens, self._longest)
        return most, min(most, _FEW_ROWS)
