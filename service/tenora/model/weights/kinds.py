"""The kinds of weights. A new format is a file beside this one and an entry in `KINDS`."""

from __future__ import annotations

from collections.abc import Mapping

from tenora.model.layout import Matrix
from tenora.model.weights.base import Kind, Place
from tenora.model.weights.dense import Dense
from tenora.model.weights.packed import Packed

__all__ = ["KINDS", "kind_of"]

KINDS: tuple[Kind, ...] = (Packed, Dense)
"""The first one that supports a matrix reads it."""


def kind_of(matrix: Matrix, types: Mapping[str, str], place: Place) -> Kind:
    """The kind that reads a matrix; where none does, the plain one, whose tensors the checkpoint then lacks."""
    return next((kind for kind in KINDS if kind.supports(matrix, types, place)), Dense)
