"""DoRA (Liu et al. 2024, arXiv 2402.09353): low-rank terms, and the length of each row of their sum with the base.

y = g ∘ (W x + c·B A x) + bias with g = m / ‖W + c·B A‖. The norm is taken for a constant in the gradient, as the paper
has it; g follows from m, A and B after each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenora.adapters.kinds.dora import dora_files
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.training.kinds import lora as plain
from tenora.training.kinds.kind import AdapterKind, Files, low_rank, low_rank_scaling
from tenora.training.spec import FIRST, LoraSpec
from tenora_kernels.flags import BIAS_OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Generator, Tensor

    from tenora.training.kinds.kind import Trained


class Dora(AdapterKind):
    """Learns m beside A and B; what it costs beside LoRA is a product W · Aᵀ a module and step, and slower passes."""

    name = "dora"
    summary = "learns a low-rank change of the weights and, apart from it, the length of each of their rows"
    shared = FIRST

    def ranks(self, rows: TableRows, lora: LoraSpec) -> list[int]:
        """See `AdapterKind`."""
        ranks = low_rank(rows, lora)
        for module in rows.modules:
            for kind in (RowKind.SCALE, RowKind.MAGNITUDE):
                ranks[rows.row(kind, module.path)] = int(ranks[module.row] > 0)
        return ranks

    def scaling(self, lora: LoraSpec) -> float:
        """See `AdapterKind`."""
        return low_rank_scaling(lora)

    def flags(self, lora: LoraSpec) -> int:
        """See `AdapterKind`."""
        return BIAS_OUTSIDE

    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """As LoRA, and m = ‖W‖."""
        plain.KIND.initialise(adapter, generator)
        for norm, _, magnitude in _norms(adapter):
            adapter.a(magnitude)[0].copy_(norm)

    def gradients(self, adapter: Trained) -> None:
        """∂L/∂m = ∂L/∂g / ‖W + c·B A‖; g itself learns nothing."""
        for norm, scale, magnitude in _norms(adapter):
            of_scale = adapter.grad_a(scale)
            adapter.grad_a(magnitude).copy_(of_scale / norm)
            of_scale.zero_()

    def derive(self, adapter: Trained) -> None:
        """g = m / ‖W + c·B A‖."""
        for norm, scale, magnitude in _norms(adapter):
            adapter.a(scale).copy_(adapter.a(magnitude) / norm)

    def files(self, adapter: Trained, base_model: str) -> Files:
        """See `AdapterKind`."""
        magnitudes = {path: m[0] for path, m in adapter.matrices(RowKind.MAGNITUDE).items()}
        return dora_files(base_model, adapter.lora, adapter.export(), magnitudes)


def _norms(adapter: Trained) -> Iterator[tuple[Tensor, int, int]]:
    """Of each module ‖W + c·B A‖ [out], and the rows of its scale and magnitude."""
    rows = adapter.rows
    for row in adapter.filled(RowKind.LOW_RANK):
        path = rows.rows[row].path
        norm = adapter.base.row_norms.of(row, adapter.a(row), adapter.bt(row), adapter.scaling)
        yield norm, rows.row(RowKind.SCALE, path), rows.row(RowKind.MAGNITUDE, path)


KIND = Dora()
