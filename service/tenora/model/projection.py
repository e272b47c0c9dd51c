"""The frozen projection with adapters: one GEMM and one low-rank operation per group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenora.model.context import ForwardContext
from tenora.model.packed import PackedLinear
from tenora.model.spec import PROJECTIONS, ModelSpec
from tenora_kernels.layout import LoraSite
from tenora_kernels.ops import add_lora


class LayerSites(NamedTuple):
    """Where the adapters of one layer act."""

    qkv: LoraSite
    o: LoraSite
    gate_up: LoraSite
    down: LoraSite


def lora_sites(spec: ModelSpec) -> tuple[LayerSites, ...]:
    """The four projection groups of every layer; rows as `target_modules` numbers them."""
    q, kv, mlp, hidden = spec.q_size, spec.kv_size, spec.intermediate_size, spec.hidden_size

    def layer(first: int) -> LayerSites:
        return LayerSites(
            qkv=LoraSite(row=first, in_features=hidden, slices=((0, q), (q, q + kv), (q + kv, q + 2 * kv))),
            o=LoraSite(row=first + 3, in_features=q, slices=((0, hidden),)),
            gate_up=LoraSite(row=first + 4, in_features=hidden, slices=((0, mlp), (mlp, 2 * mlp))),
            down=LoraSite(row=first + 6, in_features=mlp, slices=((0, hidden),)),
        )

    return tuple(layer(index * len(PROJECTIONS)) for index in range(spec.num_layers))


class Projection(nn.Module):
    """y = x · Wᵀ + b, plus what each row's adapter adds.

    The weights are frozen: gradients flow to x (and to the adapters), never to W or b.

    Attributes:
        weight: [out, in] in the compute type, the group's matrices one below the other; None if it is packed.
        packed: the same, packed for the CPU's kernels; None if it is not.
        bias: [out] or None; a group where only some matrices have a bias holds zeros for the others.
        site: the columns of y that the group's adapters write.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, site: LoraSite, *, bias: bool, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        out_features = site.slices[-1][1]
        empty = torch.empty(out_features, site.in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))
        self.packed: PackedLinear | None = None
        self.site = site

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Map x [T, in] to [T, out]."""
        y = self._multiply(x)
        if context.lora is None:
            return y
        adapted = x if context.lora_dropout is None else context.lora_dropout(x)
        return add_lora(y, adapted, self.site, context.lora)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            y = self.packed(x)
            return y if self.bias is None else y + self.bias
        if self.weight is None:
            raise RuntimeError("the weight was taken away to be packed, and no packed one was put in its place.")
        return F.linear(x, self.weight, self.bias)
