"""(IA)³: each column of keys, values and the MLP's inner activations is scaled (Liu et al. 2022, arXiv 2205.05638).

A scale of what the MLP's last module reads, act(gate) · up, is one of the output of `up`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenora.adapters.kinds.ia3 import ia3_files
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.training.kinds.kind import AdapterKind, Files, chosen_modules
from tenora.training.spec import LoraSpec

if TYPE_CHECKING:
    from torch import Generator

    from tenora.training.kinds.kind import Trained


class Ia3(AdapterKind):
    """A vector for keys, values and what the MLP's last module reads; at ten times the usual rate, as PEFT advises."""

    name = "ia3"
    summary = "learns to scale keys, values and the MLP's inner activations"
    rate = 10.0
    learned = (RowKind.SCALE,)

    def ranks(self, rows: TableRows, lora: LoraSpec) -> list[int]:
        """See `AdapterKind`."""
        scaled = {*rows.cached, *rows.factors.values()}
        ranks = [0] * len(rows)
        for path in chosen_modules(rows, lora, ()):
            ranks[rows.row(RowKind.SCALE, path)] = int(path in scaled)
        return ranks

    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """Every scale 1."""
        del generator
        for row in adapter.filled(RowKind.SCALE):
            adapter.a(row).fill_(1.0)

    def files(self, adapter: Trained, base_model: str) -> Files:
        """See `AdapterKind`."""
        return ia3_files(base_model, adapter.matrices(RowKind.SCALE), adapter.rows)


KIND = Ia3()
