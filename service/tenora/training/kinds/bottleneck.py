"""Bottlenecks one after the other with the base's blocks (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020,
arXiv 2005.00247).
"""

from __future__ import annotations

from tenora.training.kinds.bottlenecks import Bottlenecks, activation, reduction
from tenora.training.settings import Setting
from tenora.training.spec import LoraSpec

_PLACES = {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("mlp",)}


class Sequential(Bottlenecks):
    """h is the block's own output."""

    name = "bottleneck"
    summary = "learns a small network after the base's blocks"
    settings = (
        reduction(16),
        activation("silu"),
        Setting(
            "Which blocks have one: houlsby, attention and MLP; pfeiffer, the MLP.",
            name="placement",
            kind=str,
            choices=tuple(_PLACES),
            default="houlsby",
            flag="--placement",
        ),
    )

    def blocks(self, lora: LoraSpec) -> tuple[str, ...]:
        """See `Bottlenecks`."""
        return _PLACES[lora.own["placement"]]


KIND = Sequential()
