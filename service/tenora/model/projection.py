"""The frozen projection with adapters: one GEMM and one low-rank operation per site of the layout, and its scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tenora.adapters.table_rows import RowKind, TableRows
from tenora.model.context import ForwardContext
from tenora.model.layout import Block, Layout, Site
from tenora.model.weights.base import Weight
from tenora_kernels.layout import BottleneckSite, LoraSite
from tenora_kernels.ops import add_lora, scale_columns

__all__ = ["Projection", "bottleneck_site", "lora_site"]


def lora_site(rows: TableRows, layout: Layout, layer: int, site: Site) -> LoraSite:
    """Where the adapters of a layer act at a site; rows as `table_rows` numbers them."""
    row = layout.row(layer, site)
    scale_row = rows.row(RowKind.SCALE, rows.modules[row].path)
    return LoraSite(row=row, in_features=site.input, slices=site.slices, scale_row=scale_row)


def bottleneck_site(rows: TableRows, layout: Layout, layer: int, block: Block) -> BottleneckSite:
    """Where the bottlenecks of a layer act after a block."""
    path = layout.path(layer, block.name)
    return BottleneckSite(
        row=rows.row(RowKind.BOTTLENECK, path),
        outer_row=rows.row(RowKind.OUTER_BIAS, path),
        inner_row=rows.row(RowKind.INNER_BIAS, path),
        features=rows.hidden,
    )


class Projection(nn.Module):
    """y = x · Wᵀ + b, plus what each row's adapter adds, times its scale.

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
        y = add_lora(y, adapted, self.site, context.lora)
        return scale_columns(y, self.site, context.lora, self.bias)
