"""Bottlenecks beside the base's MLPs (He et al. 2021, arXiv 2110.04366)."""

from __future__ import annotations

from tenora.training.kinds.bottlenecks import Bottlenecks, activation, reduction
from tenora.training.settings import Setting
from tenora.training.spec import LoraSpec
from tenora_kernels.flags import PARALLEL


class Parallel(Bottlenecks):
    """h is what the residual stream is before the block."""

    name = "parallel"
    summary = "learns a small network beside the base's MLPs"
    kind_flags = PARALLEL
    settings = (
        reduction(16),
        activation("relu"),
        Setting("What a bottleneck's output is multiplied with.", name="scaling", above=0, most=1000, default=4.0),
    )

    def blocks(self, lora: LoraSpec) -> tuple[str, ...]:
        """See `Bottlenecks`."""
        return ("mlp",)

    def scaling(self, lora: LoraSpec) -> float:
        """See `AdapterKind`."""
        return float(lora.own["scaling"])


KIND = Parallel()
