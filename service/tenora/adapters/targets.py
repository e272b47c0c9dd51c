"""The modules of a base model that an adapter may change. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One linear projection of the base, as transformers names it.

    Attributes:
        path: dotted name in the transformers model, such as `model.layers.0.self_attn.q_proj`.
        row: its row in `tenora_kernels.layout.LoraTables`; the rows of a model are 0, 1, 2, … without gaps.
        in_features: width of its input.
        out_features: width of its output.
    """

    path: str
    row: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """The last part of the path, `q_proj`: what `target_modules` lists in adapter_config.json."""
        return self.path.rpartition(".")[2]
