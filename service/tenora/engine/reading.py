"""Adapters from their files to what a slot takes: one version, or several composed."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tenora.adapters.combining import combine
from tenora.adapters.peft_format import AdapterReader
from tenora.adapters.prepared import PreparedAdapter, prepare
from tenora.adapters.ref import AdapterRef
from tenora.adapters.weights import AdapterWeights
from tenora.model.decoder import Decoder
from tenora.model.magnitudes import RowNorms, with_scales
from tenora.model.spec import table_rows


class AdapterFiles:
    """Reads and prepares adapters. `read` runs on the loader's thread."""

    def __init__(self, decoder: Decoder, arena: Tensor, *, max_rank: int) -> None:
        """Adapters of a base are prepared for `arena`."""
        self._rows, self._norms = table_rows(decoder.spec), RowNorms(decoder)
        self._arena, self._max_rank = arena, max_rank
        self._reader = AdapterReader(self._rows, max_rank=max_rank)

    def read(self, ref: AdapterRef) -> PreparedAdapter:
        """What `SlotPool.insert` copies; every byte that it is made of was compared with its digest.

        Raises:
            AdapterDamagedError, AdapterFormatError, FileNotFoundError: as `AdapterReader.load`.
            CompositionError: the parts do not go together.
        """
        if ref.composition is None:
            return self._reader.load(Path(ref.path), ref.digest, self._prepared)
        parts = [self._reader.load(Path(part.path), part.digest, _as_read) for part in ref.composition.parts]
        return self._prepared(combine(ref, parts, self._rows.modules, max_rank=self._max_rank))

    def _prepared(self, weights: AdapterWeights) -> PreparedAdapter:
        weights = with_scales(weights, self._rows, self._norms)
        return prepare(weights, self._rows, dtype=self._arena.dtype, device=self._arena.device)


def _as_read(weights: AdapterWeights) -> AdapterWeights:
    return weights
