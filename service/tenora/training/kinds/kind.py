"""What a kind of adapters declares to be trained, and what it does on the way.

As with methods one object has both sides: what it declares is read by the whole service, what it does is called by the
arena, in the engine. Importing it loads no torch, so what needs torch imports it where it is used.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tenora.adapters.table_rows import RowKind, TableRows
from tenora.errors import TrainingError
from tenora.training.settings import Setting
from tenora.training.spec import LORA, LoraSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from tenora.adapters.safetensors_file import Array
    from tenora.model.magnitudes import RowNorms

__all__ = ["AdapterKind", "Base", "Files", "Trained", "chosen_modules", "low_rank", "low_rank_scaling"]

Files = tuple[dict[str, Any], dict[str, "Array"]]
"""The fields of an adapter_config.json, and tensors by name."""


class Base(Protocol):
    """A base's weights, as far as adapters depend on them."""

    @property
    def row_norms(self) -> RowNorms:
        """Of the rows of its matrices."""

    @property
    def family(self) -> str:
        """Its `model_type`."""

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""

    @property
    def heads(self) -> int:
        """Of its queries."""

    @property
    def kv_heads(self) -> int:
        """Of its keys."""

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, H] of tokens [n]."""


class Trained(Protocol):
    """An adapter in training, as its kind sees it: `tenora.training.arena.TrainedAdapter`."""

    @property
    def lora(self) -> LoraSpec:
        """Its shape."""

    @property
    def rows(self) -> TableRows:
        """The base's."""

    @property
    def base(self) -> Base:
        """The base's weights."""

    @property
    def scaling(self) -> float:
        """Of its low-rank terms."""

    @property
    def flags(self) -> int:
        """Of its slot."""

    def filled(self, kind: RowKind) -> list[int]:
        """The rows of a kind that it fills."""

    def a(self, row: int) -> Tensor:
        """View of the masters of A, [r, in]."""

    def bt(self, row: int) -> Tensor:
        """View of the masters of Bᵀ, [r, out]."""

    def grad_a(self, row: int) -> Tensor:
        """View of the gradient of A."""

    def matrices(self, kind: RowKind, *, transposed_b: bool = False) -> dict[str, Array]:
        """A of the rows of a kind, or their Bᵀ, by path, on the host."""

    def export(self) -> Mapping[str, tuple[Array, Array]]:
        """Low-rank terms by path: A [r, in] and B [out, r], on the host."""


class AdapterKind(ABC):
    """A kind of adapters.

    Attributes:
        name: its `type` in a request.
        summary: what it learns, in half a sentence.
        shared: which of LoRA's settings it has, too.
        settings: its own; `LoraSpec.own` holds their values.
        rate: times a method's usual rate.
        learned: kinds of rows that its file holds, and that training must have changed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[Setting, ...]] = ()
    rate: ClassVar[float] = 1.0
    learned: ClassVar[tuple[RowKind, ...]] = (RowKind.LOW_RANK,)

    @property
    def declared(self) -> Mapping[str, Setting]:
        """What a request may say beside the type."""
        return {**{name: LORA[name] for name in self.shared}, **{setting.name: setting for setting in self.settings}}

    def own_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of its own settings: the given ones, where they are not None, and defaults."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return {setting.name: chosen.get(setting.name, setting.default) for setting in self.settings}

    @abstractmethod
    def ranks(self, rows: TableRows, lora: LoraSpec) -> list[int]:
        """Of each row of the base, 0 for one that the adapter does not fill.

        Raises:
            TrainingError: the base has not what it names.
        """

    def scaling(self, lora: LoraSpec) -> float:
        """What the terms of its low-rank rows are multiplied with."""
        del lora
        return 1.0

    def virtual_tokens(self, lora: LoraSpec) -> int:
        """How much of the context it takes before a text begins."""
        del lora
        return 0

    def flags(self, lora: LoraSpec) -> int:
        """Bits of `LoraTables.flags` that its rows do not tell."""
        del lora
        return 0

    @abstractmethod
    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """Set the master weights, which are zero, so that the adapter begins as the base."""

    def gradients(self, adapter: Trained) -> None:  # noqa: B027  # usually they are the same
        """Make of the gradients of what passes read those of what is learned, before a step."""

    def derive(self, adapter: Trained) -> None:  # noqa: B027  # usually there is nothing
        """Make anew of the weights whatever passes read beside them, after a step."""

    @abstractmethod
    def files(self, adapter: Trained, base_model: str) -> Files:
        """The adapter as it is written."""


def chosen_modules(rows: TableRows, lora: LoraSpec, wanted: Sequence[str]) -> list[str]:
    """Paths of the modules with these names in the layers of a shape, in table order; of all if there are no names.

    Raises:
        TrainingError: the base has no module of a name, or fewer layers.
    """
    known = {module.name for module in rows.modules}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise TrainingError(f"The base has no module {unknown}; it has {', '.join(sorted(known))}.")
    if lora.last_layers > len(rows.layers):
        raise TrainingError(
            f"The base has {len(rows.layers)} layers, and the last {lora.last_layers} were asked for; ask for fewer.",
            code="invalid_request",
        )
    first = len(rows.layers) - lora.last_layers if lora.last_layers else 0
    named = [module for module in rows.modules if not wanted or module.name in wanted]
    return [module.path for module in named if (rows.layer(module.row) or 0) >= first]


def low_rank(rows: TableRows, lora: LoraSpec) -> list[int]:
    """Ranks of an adapter with low-rank terms in the modules that its shape names.

    Raises:
        TrainingError: see `chosen_modules`; or the rank is below 1.
    """
    if lora.rank < 1:
        raise TrainingError(f"The rank is {lora.rank} and must be at least 1.")
    ranks = [0] * len(rows)
    for path in chosen_modules(rows, lora, lora.target_modules):
        ranks[rows.row(RowKind.LOW_RANK, path)] = lora.rank
    return ranks


def low_rank_scaling(lora: LoraSpec) -> float:
    """alpha / rank, or alpha / √rank with rsLoRA."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)
