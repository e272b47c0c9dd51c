"""The fields of a request, as its schema has them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The names of all fields, with those of the objects within them in place of these."""
    for name, field in model.model_fields.items():
        inner = next((kind for kind in _parts(field.annotation) if issubclass(kind, BaseModel)), None)
        if inner is None:
            yield prefix + name
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def _parts(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, list, typing.Annotated):
        return [kind for inner in typing.get_args(annotation) for kind in _parts(inner)]
    return []
