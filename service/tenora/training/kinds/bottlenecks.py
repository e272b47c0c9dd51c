"""What the kinds of bottleneck adapters have in common: y ← y + s · (U · f(D · h + b_d) + b_u) after a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tenora.adapters.kinds.bottleneck import Bottleneck, bottleneck_files
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.training.kinds.kind import AdapterKind, Files
from tenora.training.settings import Setting
from tenora.training.spec import LoraSpec
from tenora_kernels.flags import ACTIVATIONS

if TYPE_CHECKING:
    from torch import Generator

    from tenora.training.kinds.kind import Trained

__all__ = ["Bottlenecks", "activation", "reduction"]

_STANDARD_DEVIATION = 0.02
_BIASES = {RowKind.OUTER_BIAS: False, RowKind.INNER_BIAS: True}  # as wide as the bottleneck, or as the hidden states


def reduction(default: float) -> Setting:
    """How narrow the bottlenecks are."""
    return Setting(
        "Width of the hidden states divided by that of a bottleneck.",
        name="reduction_factor",
        least=1,
        most=10_000,
        default=default,
        flag="--reduction-factor",
    )


def activation(default: str) -> Setting:
    """f."""
    return Setting(
        "Function between the two matrices of a bottleneck.",
        name="non_linearity",
        kind=str,
        choices=ACTIVATIONS,
        default=default,
    )


class Bottlenecks(AdapterKind):
    """Bottlenecks after some blocks of every layer."""

    kind_flags: ClassVar[int] = 0
    learned = (RowKind.BOTTLENECK,)

    def blocks(self, lora: LoraSpec) -> tuple[str, ...]:
        """Last parts of the paths of the blocks that have one."""
        raise NotImplementedError

    def ranks(self, rows: TableRows, lora: LoraSpec) -> list[int]:
        """See `AdapterKind`."""
        width = max(int(rows.hidden // lora.own["reduction_factor"]), 1)
        first = len(rows.layers) - lora.last_layers if lora.last_layers else 0
        ranks = [0] * len(rows)
        for path in rows.blocks:
            row = rows.row(RowKind.BOTTLENECK, path)
            if path.rpartition(".")[2] in self.blocks(lora) and (rows.layer(row) or 0) >= first:
                ranks[row] = width
                for kind, is_inner in _BIASES.items():
                    ranks[rows.row(kind, path)] = width if is_inner else 1
        return ranks

    def flags(self, lora: LoraSpec) -> int:
        """See `AdapterKind`."""
        return ACTIVATIONS.index(lora.own["non_linearity"]) | self.kind_flags

    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """D normal with a deviation of 0.02, as BERT's; U and the biases zero."""
        for row in adapter.filled(RowKind.BOTTLENECK):
            down = adapter.a(row)
            down.copy_(down.new_empty(down.shape, device="cpu").normal_(0, _STANDARD_DEVIATION, generator=generator))

    def files(self, adapter: Trained, base_model: str) -> Files:
        """See `AdapterKind`."""
        down, up = adapter.matrices(RowKind.BOTTLENECK), adapter.matrices(RowKind.BOTTLENECK, transposed_b=True)
        inner, outer = adapter.matrices(RowKind.INNER_BIAS), adapter.matrices(RowKind.OUTER_BIAS)
        found = {path: Bottleneck(down[path], inner[path][:, 0], up[path].T, outer[path][0]) for path in down}
        return bottleneck_files(
            base_model,
            found,
            flags=adapter.flags,
            scaling=adapter.scaling,
            layers=len(adapter.rows.layers),
            family=adapter.base.family,
        )
