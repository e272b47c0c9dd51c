"""Heads of an adapter: what they make of hidden states, and how that is told in its file. Free of torch.

The weights of all heads of an adapter lie one below the other in one row of the tables (`RowKind.HEAD`), their biases
in another. What each of them is lies in the metadata of the safetensors file, and is therefore part of the digest; PEFT
passes it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from tenora.errors import AdapterFormatError

__all__ = ["METADATA_KEY", "Head", "decode_heads", "encode_heads"]

METADATA_KEY = "tenora_heads"
MAX_HEADS = 64
MAX_LAYERS_BELOW = 4
"""A head may read the output of so many of the last layers."""


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One head.

    Attributes:
        name: what a request calls it; unique within the adapter.
        kind: classification gives probabilities of its labels, regression and scalar numbers, embedding a vector.
        start, stop: its rows among those of all heads; an embedding without any is what it reads.
        labels: of classification, one for each row (of two classes, too).
        multi_label: labels do not exclude each other: a sigmoid each, in place of a softmax.
        pooling: which positions of a text it reads: its last one, or the mean of all.
        layer: -1 is the hidden state after the final norm; -2, -3, … are the outputs of the layers below the last.
        bias: whether it has biases.
        mean, std: what its scores are told in: score · std + mean for regression, (score - mean) / std where a scalar
            is normalised.
    """

    name: str
    kind: Literal["classification", "regression", "scalar", "embedding"]
    start: int
    stop: int
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    pooling: Literal["last", "mean"] = "last"
    layer: int = -1
    bias: bool = False
    mean: float = 0.0
    std: float = 1.0

    @property
    def size(self) -> int:
        """How many numbers it gives."""
        return self.stop - self.start


def encode_heads(heads: Sequence[Head]) -> str:
    """Heads as the value of `METADATA_KEY`."""
    return msgspec.json.encode(heads).decode()


def decode_heads(text: str, rows: int) -> tuple[Head, ...]:
    """Heads from a file that has `rows` rows of them.

    Raises:
        AdapterFormatError: they are not described as they must be.
    """
    try:
        heads = msgspec.json.decode(text, type=tuple[Head, ...])
    except msgspec.MsgspecError as error:
        raise AdapterFormatError(f"{METADATA_KEY} in the file's metadata does not describe heads: {error}.") from error
    end = 0
    for head in heads:
        if head.start != end or head.stop < head.start or (head.kind != "embedding" and not head.size):
            raise AdapterFormatError(f"the rows of head {head.name!r} do not follow those of the one before it.")
        if head.kind == "classification" and len(head.labels) != head.size:
            raise AdapterFormatError(f"head {head.name!r} has {head.size} rows and {len(head.labels)} labels.")
        if not -MAX_LAYERS_BELOW <= head.layer <= -1:
            raise AdapterFormatError(
                f"head {head.name!r} reads layer {head.layer}; -1 to {-MAX_LAYERS_BELOW} are read."
            )
        end = head.stop
    if end != rows or len({head.name for head in heads}) != len(heads) or len(heads) > MAX_HEADS:
        raise AdapterFormatError(
            f"{METADATA_KEY} describes {len(heads)} heads of {end} rows, and the file has {rows} rows; at most "
            f"{MAX_HEADS} heads with names of their own are read."
        )
    return heads
