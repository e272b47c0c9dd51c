"""What a kind of adapters is to the reader of files: what to expect of a configuration and of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tenora.adapters.digest import WEIGHTS_NAME
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterSummary, AdapterWeights


class Plan(Protocol):
    """All that is known of an adapter without reading a weight. Plans are kept and used by several threads."""

    @property
    def summary(self) -> AdapterSummary:
        """What it is."""

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """The adapter, from the values of every tensor of the file by name; bfloat16 as its bits in uint16."""


class Configuration(Protocol):
    """An adapter_config.json that was read and checked."""

    @property
    def raw(self) -> Mapping[str, Any]:
        """The whole file."""

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> Plan:
        """What the tensors of the file become on a base.

        Args:
            entries: every tensor of the file by name, in the order of their bytes.
            rows: those of the base that an adapter can fill.
            max_rank: highest rank that is accepted.

        Raises:
            AdapterFormatError: a tensor is missing, is of another shape than the configuration and the base ask for,
                or belongs to nothing that the configuration names.
        """


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of adapters.

    Attributes:
        name: what `AdapterSummary.kind` says.
        title: what an adapter of it is, as a sentence begins.
        is_of: whether the fields of an adapter_config.json are those of this kind.
        parse: reads and checks them; raises AdapterFormatError that names the field and says what to do.
        composes: whether it is low-rank matrices that act on every token, and nothing else: several of them act as one
            (`tenora.adapters.composition`).
        library: whose format it is in: that of "peft", or of AdapterHub's "adapters".
        weights_name: what the format calls the file of the weights; in the store all have one name.
    """

    name: str
    title: str
    is_of: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], Configuration]
    composes: bool = False
    library: Literal["peft", "adapters"] = "peft"
    weights_name: str = WEIGHTS_NAME
