"""The paged key-value cache: fixed blocks that sequences borrow, reached through block tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tenora.model.spec import ModelSpec
from tenora_kernels.cpu.attention.attention import allocate_cache, supports


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer.

    Position p of a sequence lies in block `block_tables[sequence, p // block_size]` at offset `p % block_size`; its
    *KV slot* is block · block_size + offset. Who owns which block is the engine's business. Content of a block that
    nobody wrote is undefined.

    Attributes:
        k, v: per layer [num_blocks, block_size, kv_heads, head_dim]. In memory they lie as the attention of their
            device reads them; views, not to be flattened.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Reserve `num_blocks · bytes_per_block` bytes; on CPU pages are touched only when they are written."""
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        if torch.device(device).type == "cpu" and supports(dtype, spec.head_dim):
            keys, values = zip(*(allocate_cache(*shape, dtype) for _ in range(spec.num_layers)), strict=True)
            return cls(keys, values)
        k, v = (tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)) for _ in range(2))
        return cls(k, v)

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all the layers, keys and values."""
        return 2 * spec.num_layers * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        return self.k[0].shape[0]

    @property
    def block_size(self) -> int:
        """Positions in a block."""
        return self.k[0].shape[1]

    @property
    def panelled(self) -> bool:
        """Whether the compiled attention of the CPU takes it."""
        return self.k[0].device.type == "cpu" and not self.k[0].is_contiguous()

    def write(self, layer: int, kv_slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, kv_heads, head_dim] of one layer at `kv_slots` int64 [T]."""
        for cached, new in ((self.k[layer], k), (self.v[layer], v)):
            if cached.is_contiguous():
                cached.flatten(0, 1).index_copy_(0, kv_slots, new)
            else:
                cached[kv_slots // self.block_size, kv_slots % self.block_size] = new

    def read(self, layer: int, kv_slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of k and v at `kv_slots` int64 [n]: two tensors [n, kv_heads, head_dim]."""
        return self._rows(self.k[layer], kv_slots), self._rows(self.v[layer], kv_slots)

    def _rows(self, cached: Tensor, kv_slots: Tensor) -> Tensor:
        if cached.is_contiguous():
            # index_select copies whole rows; advanced indexing took 3 to 4 times as long.
            return cached.flatten(0, 1).index_select(0, kv_slots)
        return cached[kv_slots // self.block_size, kv_slots % self.block_size]
