"""The frozen projection with adapters: one GEMM and one low-rank operation per site of the layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenora.model.context import ForwardContext
from tenora.model.layout import Layout, Site
from tenora.model.weights.base import Weight
from tenora_kernels.layout import LoraSite
from tenora_kernels.ops import add_lora

__all__ = ["Projection", "lora_site"]


def lora_site(layout: Layout, layer: int, site: Site) -> LoraSite:
    """Where the adapters of a layer act at a site; rows as `target_modules` numbers them."""
    return LoraSite(row=layout.row(layer, site), in_features=site.input, slices=site.slices)


class Projection(nn.Module):
    """y = x · Wᵀ + b, plus what each row's adapter adds.

    The weights are frozen: gradients flow to x (and to the adapters), never to W or b.

    Attributes:
        weight: [out, in], the site's matrices one below the other.
        bias: [out] or None.
        site: the columns of y that the site's adapters write.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        site: LoraSite,
        weight: Weight,
        *,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        zeros = torch.zeros(weight.shape[0], dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))
        self.site = site

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Map x [T, in] to [T, out]."""
        y = self.weight.multiply(x, self.bias)
        if context.lora is None:
            return y
        adapted = x if context.lora_dropout is None else context.lora_dropout(x)
        return add_lora(y, adapted, self.site, context.lora)
