"""From a fused q, k, v projection to heads, in plain torch: normalised where the model does so, and rotated."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from tenora.model.rotary import rotate

__all__ = ["Attention", "HeadNorm", "TorchHeads"]


class HeadNorm(Protocol):
    """An RMSNorm of each head of q and k."""

    @property
    def weight(self) -> Tensor:
        """[Hq + Hkv, D]."""
        ...

    @property
    def eps(self) -> float:
        """What is added to the mean of the squares."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x [T, Hq + Hkv, D]."""
        ...


class Attention(Protocol):
    """What a decoder layer asks for."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attend from every token to its own sequence, up to itself.

        Args:
            layer: index of the layer, for implementations that keep state per layer.
            q: [T, Hq, D], rotated; k, v: [T, Hkv, D], k rotated.
            window: how many positions a token sees, itself included; None is all.

        Returns:
            [T, Hq · D].
        """
        ...

    def attend_qkv(
        self,
        layer: int,
        qkv: Tensor,
        kv_heads: int,
        rope: tuple[Tensor, Tensor],
        window: int | None,
        norm: HeadNorm | None,
    ) -> Tensor:
        """`attend` straight from the fused projection.

        Args:
            layer: index of the layer.
            qkv: [T, Hq + 2 Hkv, D], neither normalised nor rotated; not changed.
            kv_heads: Hkv.
            rope: cos and sin [T, D], contiguous, in the type of qkv.
            window: see `attend`.
            norm: of q and k; None if the model has none.

        Returns:
            [T, Hq · D].
        """
        ...


class TorchHeads:
    """`Attention.attend_qkv` for whoever has `attend`; gradients flow as far as they flow there."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See `Attention`."""

    def attend_qkv(
        self,
        layer: int,
        qkv: Tensor,
        kv_heads: int,
        rope: tuple[Tensor, Tensor],
        window: int | None,
        norm: HeadNorm | None,
    ) -> Tensor:
        """See `Attention`."""
        heads = qkv.shape[1] - 2 * kv_heads
        qk, v = torch.split(qkv, [heads + kv_heads, kv_heads], dim=1)
        q, k = torch.split(rotate(qk if norm is None else norm(qk), *rope), [heads, kv_heads], dim=1)
        return self.attend(layer, q, k, v, window)
