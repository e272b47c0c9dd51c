"""The rows of `LoraTables` that adapters of a base can fill: all that there is to an adapter, of whatever kind.

A row holds two matrices with a common first dimension r, A [r, in] and Bᵀ [r, out]; a vector of n numbers is a row with
r = 1, in = n and out = 0. So one arena, one pool and one optimizer carry every kind. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tenora.adapters.matching import layer_number
from tenora.adapters.targets import TargetModule
from tenora_kernels.flags import BOTTLENECKS, SCALES

__all__ = ["RowKind", "TableRow", "TableRows"]


class RowKind(StrEnum):
    """What a row is. A kind's rows lie together, in the order of these.

    LOW_RANK: of a module, B · A is added to its weights.
    BOTTLENECK: of a block, down [r, H] and up, transposed, [r, H] of a bottleneck after it.
    SCALE: of a module, what its output's columns are multiplied with.
    OUTER_BIAS: of a block, the bottleneck's second bias [H].
    INNER_BIAS: of a block, its first bias, as a column [r, 1].
    HEAD: weights [k, H] of all the adapter's heads, one below the other.
    HEAD_BIAS: their biases, as a column [k, 1].
    PREFIX: of a layer, keys and values of r virtual tokens, [r, 2 · kv].
    PROMPT: embeddings [r, H] of r virtual tokens.
    MAGNITUDE: of a module, DoRA's magnitude, from which training makes the scale.
    """

    LOW_RANK = "low_rank"
    BOTTLENECK = "bottleneck"
    SCALE = "scale"
    OUTER_BIAS = "outer_bias"
    INNER_BIAS = "inner_bias"
    HEAD = "head"
    HEAD_BIAS = "head_bias"
    PREFIX = "prefix"
    PROMPT = "prompt"
    MAGNITUDE = "magnitude"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row.

    Attributes:
        kind: what it is.
        path: whose: a module's, a block's or a layer's; empty where the adapter has one.
        in_features: columns of A.
        out_features: columns of Bᵀ.
    """

    kind: RowKind
    path: str
    in_features: int
    out_features: int = 0


@dataclass(frozen=True)
class TableRows:
    """Every row of a base, in table order.

    Attributes:
        modules: what low-rank terms may change; module i has row i.
        blocks: paths of the blocks of all layers, layer after layer.
        layers: paths of the layers.
        hidden: H; 0: there are low-rank rows only.
        kv: columns of a token's keys in one layer, and of its values.
        factors: by path of a module, that of another one whose output's columns are factors of its input's.
        cached: paths of the modules whose output are keys or values.
    """

    modules: tuple[TargetModule, ...]
    blocks: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    hidden: int = 0
    kv: int = 0
    factors: Mapping[str, str] = field(default_factory=dict)
    cached: tuple[str, ...] = ()
    rows: tuple[TableRow, ...] = field(init=False, repr=False, compare=False)
    _places: dict[tuple[RowKind, str], int] = field(init=False, repr=False, compare=False)
    _spans: dict[RowKind, range] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if [module.row for module in self.modules] != list(range(len(self.modules))):
            raise ValueError("the modules must be given in the order of their rows 0, 1, 2, …")
        hidden = self.hidden
        of_adapter = {RowKind.HEAD: hidden, RowKind.HEAD_BIAS: 1, RowKind.PROMPT: hidden}
        made: list[TableRow] = []
        spans: dict[RowKind, range] = {}
        for kind in RowKind:
            first = len(made)
            match kind:
                case RowKind.LOW_RANK:
                    made += (TableRow(kind, m.path, m.in_features, m.out_features) for m in self.modules)
                case _ if not hidden:
                    pass
                case RowKind.SCALE | RowKind.MAGNITUDE:
                    made += (TableRow(kind, module.path, module.out_features) for module in self.modules)
                case RowKind.BOTTLENECK:
                    made += (TableRow(kind, block, hidden, hidden) for block in self.blocks)
                case RowKind.OUTER_BIAS | RowKind.INNER_BIAS:
                    made += (
                        TableRow(kind, block, hidden if kind == RowKind.OUTER_BIAS else 1) for block in self.blocks
                    )
                case RowKind.PREFIX:
                    made += (TableRow(kind, layer, 2 * self.kv) for layer in self.layers)
                case _:
                    made.append(TableRow(kind, "", of_adapter[kind]))
            spans[kind] = range(first, len(made))
        object.__setattr__(self, "rows", tuple(made))
        object.__setattr__(self, "_places", {(row.kind, row.path): place for place, row in enumerate(made)})
        object.__setattr__(self, "_spans", spans)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def in_features(self) -> tuple[int, ...]:
        """Columns of A, by row."""
        return tuple(row.in_features for row in self.rows)

    @property
    def out_features(self) -> tuple[int, ...]:
        """Columns of Bᵀ, by row."""
        return tuple(row.out_features for row in self.rows)

    @property
    def low_rank(self) -> int:
        """How many rows, from the first, are products of two matrices: those of modules and of bottlenecks."""
        return self._spans[RowKind.BOTTLENECK].stop

    def of(self, kind: RowKind) -> range:
        """The rows of a kind; empty if the base was given without them."""
        return self._spans[kind]

    def row(self, kind: RowKind, path: str = "") -> int:
        """The row of a module, a block, a layer, or the adapter. KeyError if there is none."""
        return self._places[kind, path]

    def layer(self, row: int) -> int | None:
        """The number of the layer that a row belongs to, for embeddings the first; None for what belongs to none."""
        found = self.rows[row]
        return 0 if found.kind is RowKind.PROMPT else layer_number(f"{found.path}.", None)

    def flags(self, ranks: Sequence[int]) -> int:
        """The bits of `LoraTables.flags` that follow from which rows an adapter fills."""
        found = {SCALES: RowKind.SCALE, BOTTLENECKS: RowKind.BOTTLENECK}
        return sum(flag for flag, kind in found.items() if any(ranks[row] for row in self.of(kind)))

    def numel(self, ranks: Sequence[int]) -> int:
        """Weights of an adapter with these ranks."""
        return sum(rank * (row.in_features + row.out_features) for rank, row in zip(ranks, self.rows, strict=True))
