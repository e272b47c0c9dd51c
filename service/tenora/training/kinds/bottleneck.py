"""Bottlenecks one after the other with the base's blocks (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020,
arXiv 2005.00247).
"""

from __future__ import annotations

from typing import NamedTuple

from tenora.training.kinds.bottlenecks import Bottlenecks, activation, reduction
from tenora.training.settings import Setting
from tenora.training.spec import LoraSpec
from tenora_kernels.flags import WITH_RESIDUAL


class _Placement(NamedTuple):
    """Blocks that have a bottleneck, and what it reads."""

    blocks: tuple[str, ...]
    reads: int


_PLACEMENTS = {
    "houlsby": _Placement(("self_attn", "mlp"), reads=0),
    "pfeiffer": _Placement(("mlp",), reads=WITH_RESIDUAL),
}


class Sequential(Bottlenecks):
    """h is the block's own output, or the residual stream with it, as AdapterHub's library has it in pre-norm bases."""

    name = "bottleneck"
    summary = "learns a small network after the base's blocks"
    settings = (
        reduction(16),
        activation("silu"),
        Setting(
            "houlsby: after attention and MLP, on a block's output; pfeiffer: after the MLP, on the residual stream.",
            name="placement",
            kind=str,
            choices=tuple(_PLACEMENTS),
            default="houlsby",
            flag="--placement",
        ),
    )

    def blocks(self, lora: LoraSpec) -> tuple[str, ...]:
        """See `Bottlenecks`."""
        return _PLACEMENTS[lora.own["placement"]].blocks

    def flags(self, lora: LoraSpec) -> int:
        """See `AdapterKind`."""
        return super().flags(lora) | _PLACEMENTS[lora.own["placement"]].reads


KIND = Sequential()
