"""Adapters that are a prefix: virtual tokens that lie in KV blocks at the head of the block table.

Whole blocks of them are blocks like others: found by their hash, shared by all sequences of the adapter in one
namespace, held while one of these runs, and forgotten with the adapter. Of a number of virtual tokens that is no
multiple of the block size, the rest shares a block with each sequence's first tokens, and is laid there for each.
"""

from __future__ import annotations

from collections.abc import Sequence

from tenora.adapters.table_rows import RowKind, TableRows
from tenora.errors import AdapterFormatError, UnavailableError
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.device import survive
from tenora.model.virtual_tokens import compute_virtual_tokens, write_virtual_tokens
from tenora_kernels.layout import LoraTables

__all__ = ["AdapterPrefixes"]


class AdapterPrefixes:
    """Lays the virtual tokens of a pool's adapters into the cache of an engine."""

    def __init__(
        self, decoder: Decoder, cache: KVCache, tables: LoraTables, rows: TableRows, *, tokens_per_pass: int
    ) -> None:
        """`tables` are the pool's, `rows` say what lies where in them; computing takes `tokens_per_pass` at a time."""
        self._decoder, self._cache, self._tables = decoder, cache, tables
        self._prefix, self._prompt = rows.of(RowKind.PREFIX), rows.of(RowKind.PROMPT)
        self._tokens_per_pass = tokens_per_pass

    def count(self, slot: int) -> int:
        """Virtual tokens of the adapter in a slot; 0 if it has none.

        Raises:
            AdapterFormatError: the base rotates a token by the length of its sequence, so no prefix fits all of them.
        """
        ranks = self._tables.arrays.ranks
        count = max((int(ranks[rows.start, slot]) for rows in (self._prefix, self._prompt) if rows), default=0)
        if count and self._decoder.rotary.depends_on_length:
            raise AdapterFormatError(
                "The base's rotary positions depend on the length of the sequence, so virtual tokens cannot be laid "
                "down once; train LoRA instead."
            )
        return count

    def lay(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Fill positions from `start` up to the adapter's count in a block table.

        Raises:
            UnavailableError: it could not be done this time; the content of the blocks is undefined.
        """
        try:
            if self._tables.rank(self._prompt.start, slot):
                embeddings = self._tables.a(self._prompt.start, slot)
                compute_virtual_tokens(
                    self._decoder, self._cache, embeddings, start, blocks, most=self._tokens_per_pass
                )
            else:
                write_virtual_tokens(self._cache, [self._tables.a(row, slot) for row in self._prefix], start, blocks)
        except Exception as error:
            survive(error, self._decoder.device)
            raise UnavailableError(
                f"The adapter's virtual tokens could not be laid down ({type(error).__name__}); retry.",
                code="adapter_unavailable",
            ) from error
