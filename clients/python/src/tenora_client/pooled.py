"""What is made of texts' hidden states: embeddings, classes, pooled states and rewards."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from tenora_client.api_object import ApiObject
from tenora_client.models import Usage


def _numbers(value: Any) -> Any:
    """Base64 of float32, the least significant byte first, as numbers; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    raw = base64.b64decode(value, validate=True)
    return struct.unpack(f"<{len(raw) // 4}f", raw)


Vector = Annotated[Sequence[float], BeforeValidator(_numbers)]
"""Numbers, of which a server sends the bytes."""


class Embedding(ApiObject):
    """One input's vector, of length 1."""

    index: int
    embedding: Vector


class EmbeddingList(ApiObject):
    """Vectors in the order of the inputs."""

    data: Sequence[Embedding]
    model: str
    usage: Usage


class Classification(ApiObject):
    """One input's likeliest label, and the probability of each in the order of `Classifications.labels`."""

    index: int
    label: str
    probs: Sequence[float]
    num_classes: int


class Classifications(ApiObject):
    """What a head thinks of the inputs. With `multi_label` labels do not exclude each other."""

    model: str
    head: str
    labels: Sequence[str]
    multi_label: bool
    data: Sequence[Classification]
    usage: Usage


class PooledData(ApiObject):
    """One input's hidden state, or what the head makes of it."""

    index: int
    data: Vector


class Pooled(ApiObject):
    """Of each input; `head` is None where the data are hidden states."""

    model: str
    head: str | None
    data: Sequence[PooledData]
    usage: Usage


class Reward(ApiObject):
    """One answer's score; `normalized` is in standard deviations from the mean that training measured."""

    index: int
    score: float
    normalized: float


class Rewards(ApiObject):
    """Scores in the order of the answers."""

    model: str
    head: str
    data: Sequence[Reward]
    usage: Usage
