"""Attention in training over keys and values that are learned themselves (prefix tuning, Li and Liang 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenora.model.attention import PackedAttention
from tenora.model.gathered import attend_one, causal_mask
from tenora.model.heads import TorchHeads
from tenora_kernels.layout import BASE, LoraTables

__all__ = ["LearnedPrefixes", "PrefixedAttention"]


class LearnedPrefixes(NamedTuple):
    """Whose virtual tokens each sequence of a stream sees before its own.

    Attributes:
        tables: hold them, [P, 2 · kv] each, keys and then values, and take their gradient.
        rows: of the tables, one per layer.
        slots: per sequence, the slot of its adapter; BASE for one that sees none.
    """

    tables: LoraTables
    rows: range
    slots: Sequence[int]


class PrefixedAttention(TorchHeads):
    """`PackedAttention` with virtual tokens at positions 0 to P - 1 of each sequence; theirs begins at P.

    Args:
        packed: how the real tokens belong together.
        learned: the virtual ones.
    """

    def __init__(self, packed: PackedAttention, learned: LearnedPrefixes) -> None:
        self._packed, self._learned = packed, learned

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention.attend`; the gradient of the virtual tokens is added to the tables'."""
        found = [q.new_empty(0, *q.shape[1:])]
        row = self._learned.rows[layer]
        for number, own, shared in self._packed.sequences():
            keys, values = torch.cat((k[shared], k[own])), torch.cat((v[shared], v[own]))
            slot = self._learned.slots[number]
            if slot != BASE:
                keys, values = _prepend(keys, values, self._learned.tables, row, slot)
            length = own.stop - own.start
            mask = causal_mask(length, len(keys), window, q.device)
            found.append(attend_one(q[own], keys, values, mask))
        return torch.cat(found).flatten(1)


def _prepend(k: Tensor, v: Tensor, tables: LoraTables, row: int, slot: int) -> tuple[Tensor, Tensor]:
    """k and v [S, Hkv, D] behind the virtual tokens of a slot: [P + S, Hkv, D]."""
    # In the first layer nothing else wants a gradient, and autograd would not come here.
    anchor = torch.empty(0, requires_grad=tables.grad is not None)
    keys, values = _Prepend.apply(k, v, anchor, tables, row, slot)  # type: ignore[no-untyped-call]  # torch
    return keys, values


class _Prepend(torch.autograd.Function):
    """`_prepend`. The real keys go through it, so that whoever wants their gradient brings that of the others about."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, anchor: Tensor, tables: LoraTables, row: int, slot: int
    ) -> tuple[Tensor, Tensor]:
        del anchor
        ctx.tables, ctx.row, ctx.slot = tables, row, slot
        learned = tables.a(row, slot).to(k.dtype)
        shape = (len(learned), *k.shape[1:])
        keys, values = (part.reshape(shape) for part in learned.chunk(2, dim=1))
        return torch.cat((keys, k)), torch.cat((values, v))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_keys: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.tables.rank(ctx.row, ctx.slot)
        if ctx.tables.grad is not None:
            learned = torch.cat((d_keys[:count].flatten(1), d_values[:count].flatten(1)), dim=1)
            ctx.tables.grad_a(ctx.row, ctx.slot).add_(learned)
        return d_keys[count:], d_values[count:], None, None, None, None
