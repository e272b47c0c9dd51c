"""Random sequences in a poisoned paged cache, for decode attention: one new query per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Pages:
    """What nobody wrote is NaN; table entries behind a context are far out of range.

    Attributes:
        q: [rows, heads, dim].
        keys, values: [blocks, block_size, kv heads, dim].
        tables: int32 [rows, width].
        contexts: int32 [rows].
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    contexts: Tensor

    @classmethod
    def make(
        cls,
        contexts: list[int],
        *,
        heads: int = 2,
        kv_heads: int = 1,
        dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        width: int = 0,
    ) -> Pages:
        generator = torch.Generator().manual_seed(len(contexts) + dim)
        needed = [-(-context // block_size) for context in contexts]
        blocks = sum(needed) + 1
        order = torch.randperm(blocks, generator=generator).tolist()
        tables = torch.full((len(contexts), max(width, *needed, 1)), 2**30, dtype=torch.int32)
        cache = torch.full((2, blocks, block_size, kv_heads, dim), float("nan"), dtype=dtype)
        for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
            tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
            position = torch.arange(context)
            at = tables[row][position // block_size].long(), position % block_size
            for part in cache:
                part[at] = torch.randn(context, kv_heads, dim, generator=generator).to(dtype)
        q = torch.randn(len(contexts), heads, dim, generator=generator).mul_(2).to(dtype)
        return cls(q, cache[0], cache[1], tables, torch.tensor(contexts, dtype=torch.int32))

    def cuda(self) -> Pages:
        return Pages(*(tensor.cuda() for tensor in vars(self).values()))

    def rows(self, chosen: list[int]) -> Pages:
        """The same cache with some of the rows."""
        return Pages(self.q[chosen], self.keys, self.values, self.tables[chosen], self.contexts[chosen])

    def wanted(self, window: int | None) -> Tensor:
        """torch's own attention in float64, row by row: [rows, heads · dim]."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        size, group = self.keys.shape[1], self.q.shape[1] // self.keys.shape[2]
        for row, context in enumerate(self.contexts.tolist()):
            if context:
                blocks = self.tables[row, : -(-context // size)].long()
                seen = slice(0 if window is None else max(0, context - window), context)
                k, v = (x[blocks].flatten(0, 1)[seen].double().transpose(0, 1) for x in (self.keys, self.values))
                k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
                out[row] = F.scaled_dot_product_attention(self.q[row].double()[:, None], k, v)[:, 0]
        return out.flatten(1)
