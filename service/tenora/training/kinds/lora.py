"""Low-rank adapters (Hu et al. 2021), with the scaling of rsLoRA if asked for (Kalajdzievski 2023)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tenora.adapters.kinds.lora import lora_config, lora_tensors
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.training.kinds.kind import AdapterKind, Files, low_rank, low_rank_scaling
from tenora.training.spec import LORA, USUAL_KIND, LoraSpec

if TYPE_CHECKING:
    from torch import Generator

    from tenora.training.kinds.kind import Trained


class Lora(AdapterKind):
    """ΔW = scaling · B · A of rank r, in every linear module unless told otherwise."""

    name = USUAL_KIND
    summary = "learns a low-rank change of the weights"
    shared = tuple(LORA)

    def ranks(self, rows: TableRows, lora: LoraSpec) -> list[int]:
        """See `AdapterKind`."""
        return low_rank(rows, lora)

    def scaling(self, lora: LoraSpec) -> float:
        """See `AdapterKind`."""
        return low_rank_scaling(lora)

    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """A uniform in ±1/√in (PEFT's Kaiming initialisation), B zero."""
        import torch

        for row in adapter.filled(RowKind.LOW_RANK):
            a = adapter.a(row)
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
            adapter.bt(row).zero_()

    def files(self, adapter: Trained, base_model: str) -> Files:
        """See `AdapterKind`."""
        modules = adapter.export()
        return lora_config(base_model, adapter.lora, modules, adapter.scaling), lora_tensors(modules)


KIND = Lora()
