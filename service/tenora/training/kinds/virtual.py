"""What the kinds of adapters that are virtual tokens before a text have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tenora.adapters.table_rows import RowKind, TableRows
from tenora.training.kinds.kind import AdapterKind
from tenora.training.settings import Setting
from tenora.training.spec import LoraSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from tenora.training.kinds.kind import Trained

__all__ = ["VirtualTokens", "sampled_tokens"]

_COUNT = Setting(
    "How many virtual tokens come before every text; they take room of the context.",
    name="num_virtual_tokens",
    kind=int,
    least=1,
    most=1024,
    default=16,
    flag="--virtual-tokens",
)


class VirtualTokens(AdapterKind):
    """Rows of one kind, as high as there are virtual tokens."""

    settings = (_COUNT,)
    row_kind: ClassVar[RowKind]

    def ranks(self, rows: TableRows, lora: LoraSpec) -> list[int]:
        """See `AdapterKind`."""
        ranks = [0] * len(rows)
        for row in rows.of(self.row_kind):
            ranks[row] = lora.own["num_virtual_tokens"]
        return ranks

    def virtual_tokens(self, lora: LoraSpec) -> int:
        """See `AdapterKind`."""
        return int(lora.own["num_virtual_tokens"])


def sampled_tokens(adapter: Trained, count: int, generator: Generator) -> Tensor:
    """Embeddings [count, H] of tokens that are drawn from the vocabulary (Lester et al. 2021)."""
    import torch

    return adapter.base.embedded(torch.randint(adapter.base.vocabulary, (count,), generator=generator))
