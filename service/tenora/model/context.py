"""What one forward pass needs beside the hidden states: positions, RoPE, attention and the adapters of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tenora.model.attention import Attention
from tenora_kernels.layout import LoraBatch


@dataclass(slots=True)
class ForwardContext:
    """Built once per step, read by every layer.

    Attributes:
        positions: int64 [T], the position of each token in its own sequence.
        rope: `Decoder.rope(positions, …)`: cos and sin, [T, head_dim], in the compute type.
        attention: `paged_attention` (serving) or `PackedAttention` (training).
        lora: the adapters of the T rows; None if every row is a base row.
        lora_dropout: training only: maps the input [T, in] of a site to what its adapters see; the frozen
            product sees the input itself. Called once per site, in layer order, so a seeded callable is reproducible.
    """

    positions: Tensor
    rope: tuple[Tensor, Tensor]
    attention: Attention
    lora: LoraBatch | None = None
    lora_dropout: Callable[[Tensor], Tensor] | None = None
