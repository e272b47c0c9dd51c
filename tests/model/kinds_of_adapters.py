"""Tables with an adapter of every kind, all random, for tests of what computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from tenora.adapters.table_rows import RowKind, TableRows
from tenora_kernels.flags import ACTIVATIONS, BIAS_OUTSIDE, PARALLEL, WITH_RESIDUAL
from tenora_kernels.layout import LoraTables

__all__ = ["KINDS", "Kind", "tables_of"]

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASES = (RowKind.INNER_BIAS, RowKind.OUTER_BIAS)


class Kind(NamedTuple):
    """What an adapter fills.

    Attributes:
        rank: of the low-rank terms; 0 for none.
        targets: names of the modules with one.
        scaled: names of modules with a scale.
        width: of the bottlenecks; 0 for none.
        blocks: names of the blocks with one.
        biased: whether bottlenecks have biases.
        activation: of the bottlenecks.
        flags: PARALLEL, WITH_RESIDUAL, BIAS_OUTSIDE.
        scaling: of every matrix.
        is_bf16: whether it lies as bfloat16.
    """

    rank: int = 0
    targets: tuple[str, ...] = ALL
    scaled: tuple[str, ...] = ()
    width: int = 0
    blocks: tuple[str, ...] = ("self_attn", "mlp")
    biased: bool = True
    activation: str = "silu"
    flags: int = 0
    scaling: float = 1.0
    is_bf16: bool = False

    def ranks(self, rows: TableRows) -> list[int]:
        """Of every row of the tables."""
        found = []
        for row in rows.rows:
            name = row.path.rpartition(".")[2]
            if row.kind == RowKind.LOW_RANK:
                found.append(self.rank if name in self.targets else 0)
            elif row.kind == RowKind.SCALE:
                found.append(int(name in self.scaled))
            elif row.kind == RowKind.BOTTLENECK and name in self.blocks:
                found.append(self.width)
            elif row.kind in BIASES and name in self.blocks and self.biased and self.width:
                found.append(self.width if row.kind == RowKind.INNER_BIAS else 1)
            else:
                found.append(0)
        return found


KINDS: Mapping[str, Kind] = {
    "lora": Kind(rank=16, scaling=0.5, is_bf16=True),
    "dora": Kind(rank=5, scaled=ALL, flags=BIAS_OUTSIDE),
    "ia3": Kind(scaled=("k_proj", "v_proj", "up_proj"), is_bf16=True),
    "houlsby": Kind(width=9),
    "pfeiffer": Kind(width=7, blocks=("mlp",), activation="relu", flags=WITH_RESIDUAL, is_bf16=True),
    "parallel": Kind(width=33, blocks=("mlp",), biased=False, activation="gelu", flags=PARALLEL, scaling=4.0),
    "tanh": Kind(width=3, blocks=("self_attn",), activation="tanh"),
    "all at once": Kind(rank=3, scaled=ALL, width=4, activation="gelu_pytorch_tanh", flags=PARALLEL, scaling=0.7),
}


def tables_of(rows: TableRows, kinds: Sequence[Kind], *, deviation: float = 0.1) -> LoraTables:
    """Slot i holds an adapter of kinds[i], normal with a deviation around 0, scales around 1; room is between them."""
    generator, offset = torch.Generator().manual_seed(5), 3
    tables = LoraTables.empty(
        torch.zeros(offset + sum(rows.numel(kind.ranks(rows)) + 1 for kind in kinds)),
        in_features=rows.in_features,
        out_features=rows.out_features,
        slots=len(kinds),
        low_rank_rows=rows.low_rank,
    )
    for slot, kind in enumerate(kinds):
        ranks = kind.ranks(rows)
        flags = rows.flags(ranks) | kind.flags | ACTIVATIONS.index(kind.activation)
        offset += tables.place(slot, offset, ranks, [kind.scaling] * len(ranks), is_bf16=kind.is_bf16, flags=flags) + 1
        for number in (number for number, rank in enumerate(ranks) if rank):
            for matrix in (tables.a(number, slot), tables.bt(number, slot)):
                values = torch.randn(matrix.shape, generator=generator) * deviation
                matrix.copy_(1 + values if rows.rows[number].kind == RowKind.SCALE else values)
    return tables
