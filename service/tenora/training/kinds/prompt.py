"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): embeddings of virtual tokens before every text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenora.adapters.kinds.virtual_tokens import prompt_files
from tenora.adapters.table_rows import RowKind
from tenora.training.kinds.kind import Files
from tenora.training.kinds.virtual import VirtualTokens, sampled_tokens

if TYPE_CHECKING:
    from torch import Generator

    from tenora.training.kinds.kind import Trained


class Prompt(VirtualTokens):
    """The smallest adapter there is: a few thousand numbers. It wants a far higher rate than LoRA and many steps."""

    name = "prompt"
    summary = "learns embeddings of virtual tokens before every text"
    rate = 60.0
    row_kind = RowKind.PROMPT
    learned = (RowKind.PROMPT,)

    def initialise(self, adapter: Trained, generator: Generator) -> None:
        """As tokens of the vocabulary."""
        for row in adapter.filled(RowKind.PROMPT):
            place = adapter.a(row)
            place.copy_(sampled_tokens(adapter, place.shape[0], generator))

    def files(self, adapter: Trained, base_model: str) -> Files:
        """See `AdapterKind`."""
        (embeddings,) = adapter.matrices(RowKind.PROMPT).values()
        return prompt_files(base_model, embeddings, layers=len(adapter.rows.layers), heads=adapter.base.heads)


KIND = Prompt()
