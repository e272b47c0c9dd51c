"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): keys and values of virtual tokens before every text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenora.adapters.kinds.virtual_tokens import prefix_files
from tenora.adapters.table_rows import RowKind
from tenora.training.kinds.kind import Files
from tenora.training.kinds.virtual import VirtualTokens

if TYPE_CHECKING:
    from torch import Generator

    from tenora.training.kinds.kind import Trained

_STANDARD_DEVIATION = 0.02


class Prefix(VirtualTokens):
    """Keys and values of its own in every layer; it wants a higher rate than LoRA."""

    name = "prefix"
    summary = "learns keys and values of virtual tokens before every text"
    rate = 20.0
    row_kind = RowKind.PREFIX
    learned = (RowKind.PREFIX,)

    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """Normal with a deviation of 0.02: virtual tokens that say next to nothing."""
        for row in adapter.filled(RowKind.PREFIX):
            place = adapter.a(row)
            place.copy_(place.new_empty(place.shape, device="cpu").normal_(0, _STANDARD_DEVIATION, generator=generator))

    def files(self, adapter: Trained, base_model: str) -> Files:
        """See `AdapterKind`."""
        layers = list(adapter.matrices(RowKind.PREFIX).values())
        return prefix_files(base_model, layers, kv_heads=adapter.base.kv_heads)


KIND = Prefix()
