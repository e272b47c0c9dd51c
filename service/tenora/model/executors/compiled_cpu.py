"""Steps on a CPU, each one compiled job from the embedding to the final norm, over packed weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import HostAdapters
from tenora.model.executors.base import Batch
from tenora_kernels.cpu.attention.attention import PagedStep, Rope
from tenora_kernels.layout import LoraTables

__all__ = ["CompiledExecutor"]


class CompiledExecutor:
    """See `Executor`. For what `supports` says; the steps of one thread at a time."""

    def __init__(self, decoder: Decoder, cache: KVCache, tables: LoraTables) -> None:
        """ValueError unless `supports(decoder, cache, tables)`."""
        if decoder.stack is None or not self.supports(decoder, cache, tables):
            raise ValueError("the compiled step needs packed weights, and a cache and adapters in float32.")
        self._decoder, self._cache, self._stack = decoder, cache, decoder.stack
        self._adapters = HostAdapters(tables, decoder.device)

    @staticmethod
    def supports(decoder: Decoder, cache: KVCache, tables: LoraTables) -> bool:
        """Whether the weights are packed, and the cache and the adapters lie as the compiled step reads them."""
        return decoder.stack is not None and cache.panelled and decoder.stack.supports(tables)

    def run(self, batch: Batch) -> Tensor:
        """See `Executor`."""
        return self.states(batch, (-1,))[0]

    def states(self, batch: Batch, layers: Sequence[int]) -> Sequence[Tensor]:
        """See `Executor`."""
        deeper = -min(layers) - 1
        taps = torch.empty(deeper, batch.tokens, self._decoder.spec.hidden_size) if deeper else None
        hidden = self._run(batch, taps)
        return [hidden if taps is None or layer == -1 else taps[layer + 1] for layer in layers]

    def warm_up(self, max_tokens: int) -> tuple[int, ...]:  # noqa: ARG002  # the protocol's
        """See `Executor`; its kernels are compiled with the base's others (`kernels.warm_up`)."""
        return ()

    def _run(self, batch: Batch, taps: Tensor | None) -> Tensor:
        lengths = None if batch.lengths is None else torch.from_numpy(batch.lengths)
        rope = self._decoder.rope(torch.from_numpy(batch.positions), lengths)
        step = PagedStep(batch.kv_slots, batch.starts, batch.contexts, batch.block_tables)
        ids = torch.from_numpy(np.asarray(batch.token_ids, np.int64))
        caches = (self._cache.k, self._cache.v)
        return self._stack.run(ids, Rope(*rope), step, caches, self._adapters.of(batch), taps)
