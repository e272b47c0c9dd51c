"""Steps through the decoder's modules, one after the other: on every device and in every type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tenora.model.attention import paged_attention
from tenora.model.cache import KVCache
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import Adapters
from tenora.model.executors.base import Batch, Integers
from tenora.model.to_device import to_device

__all__ = ["ModulesExecutor"]


class ModulesExecutor:
    """See `Executor`. Nothing of a step waits for a device."""

    def __init__(self, decoder: Decoder, cache: KVCache, adapters: Adapters) -> None:
        self._decoder, self._cache, self._adapters = decoder, cache, adapters

    def run(self, batch: Batch) -> Tensor:
        """See `Executor`."""
        return self.states(batch, (-1,))[0]

    def states(self, batch: Batch, layers: Sequence[int]) -> Sequence[Tensor]:
        """See `Executor`."""
        positions = self._tensor(batch.positions)
        attention = paged_attention(
            self._cache,
            self._tensor(batch.kv_slots),
            batch.starts.tolist(),
            batch.contexts.tolist(),
            self._tensor(np.ascontiguousarray(batch.block_tables)),  # kernels that read pages want whole rows
            team=self._decoder.team,
        )
        rope = self._decoder.rope(positions, None if batch.lengths is None else torch.from_numpy(batch.lengths))
        context = ForwardContext(positions, rope, attention, self._adapters.of(batch))
        return self._decoder.states(self._tensor(np.asarray(batch.token_ids)), context, layers)

    def warm_up(self, max_tokens: int) -> tuple[int, ...]:  # noqa: ARG002  # the protocol's
        """See `Executor`."""
        return ()

    def _tensor(self, values: Integers) -> Tensor:
        return to_device(torch.from_numpy(values), self._decoder.device)
