"""Heads in an adapter's files: read out of them and written into them, beside whatever kind the adapter is of.

PEFT knows one head, that of sequence classification: task_type SEQ_CLS, `score` in modules_to_save, and the tensor
`score.weight`, without a bias and read at the last token. Heads that are read so are written so: several as one, whose
rows PEFT scores side by side. Others have tensors of their own, which PEFT passes over. What each head is lies in the
metadata of the safetensors file (`tenora.adapters.heads`). Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tenora.adapters.foreign_names import PREFIX
from tenora.adapters.heads import METADATA_KEY, Head, decode_heads, encode_heads
from tenora.adapters.kinds.tensors import alike
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import RowKind
from tenora.adapters.weights import AdapterPart, AdapterSummary, AdapterWeights
from tenora.errors import AdapterFormatError

if TYPE_CHECKING:
    from tenora.adapters.kinds.kind import Plan

__all__ = ["HeadPlan", "HeadTensors", "plan_heads", "with_heads", "without_heads"]

SCORE = f"{PREFIX}score.weight"
WEIGHT, BIAS = "tenora_heads.weight", "tenora_heads.bias"
TENSORS = (SCORE, WEIGHT, BIAS)
MAX_ROWS = 4096
"""Of all heads of an adapter."""
_CLASSIFIERS = frozenset({"score", "classifier"})  # PEFT writes both, whichever the model has


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """The heads of an adapter that is written.

    Attributes:
        heads: whose rows follow each other.
        weight: [rows, H] of all of them; None if none has rows.
        bias: [rows, 1], 0 where a head has none; None if none has.
    """

    heads: tuple[Head, ...]
    weight: Array | None
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The heads of a file whose header was checked.

    Attributes:
        raw: the whole adapter_config.json.
    """

    heads: tuple[Head, ...] = ()
    weight: TensorEntry | None = None
    bias: TensorEntry | None = None

    raw: Mapping[str, Any] = field(default_factory=dict)

    def beside(self, rest: Plan) -> Plan:
        """The plan of the whole adapter, from that of what it is without heads."""
        return PlanWithHeads(self, rest) if self.heads else rest


@dataclass(frozen=True, slots=True)
class PlanWithHeads:
    """`tenora.adapters.kinds.kind.Plan` of an adapter of any kind that has heads."""

    own: HeadPlan
    rest: Plan

    @property
    def summary(self) -> AdapterSummary:
        """See `Plan`."""
        rest, entries = self.rest.summary, [entry for _, entry in self._rows()]
        return replace(
            rest,
            parameters=rest.parameters + sum(math.prod(entry.shape) for entry in entries),
            bfloat16=rest.bfloat16 and all(entry.dtype == "BF16" for entry in entries),
            nbytes=rest.nbytes + sum(entry.nbytes for entry in entries),
            config=self.own.raw,
            heads=self.own.heads,
        )

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `Plan`."""
        rest, whole = self.rest.weights(arrays), self.summary
        parts = tuple(_part(kind, entry, arrays) for kind, entry in self._rows())
        return replace(rest, parts=(*rest.parts, *parts), heads=whole.heads, nbytes=whole.nbytes, config=whole.config)

    def _rows(self) -> list[tuple[RowKind, TensorEntry]]:
        rows = ((RowKind.HEAD, self.own.weight), (RowKind.HEAD_BIAS, self.own.bias))
        return [(kind, entry) for kind, entry in rows if entry is not None]


def without_heads(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """An adapter_config.json as the kinds of adapters read it: what says that there is a head is taken out.

    Raises:
        AdapterFormatError: it is one of a classifier, and trains more in full than the head.
    """
    if raw.get("task_type") != "SEQ_CLS":
        return raw
    saved = raw.get("modules_to_save") or []
    others = sorted(set(saved) - _CLASSIFIERS) if isinstance(saved, list) and all(map(_is_name, saved)) else [saved]
    if others:
        raise AdapterFormatError(
            f"modules_to_save names {others[0]!r}; beside the low-rank weights only the head of a classifier "
            '("score") may be trained in full.'
        )
    return {**raw, "task_type": None, "modules_to_save": None}


def plan_heads(
    raw: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    metadata: Mapping[str, str],
    hidden: int,
) -> tuple[HeadPlan, dict[str, TensorEntry]]:
    """The heads of a file, and its other tensors.

    Args:
        raw: the whole adapter_config.json.
        entries: every tensor of the file by name.
        metadata: of the safetensors file.
        hidden: H of the base.

    Raises:
        AdapterFormatError: a tensor of them is missing or has another shape than the base needs, or the metadata does
            not describe them.
    """
    others = {name: entry for name, entry in entries.items() if name not in TENSORS}
    weight, bias = entries.get(SCORE) or entries.get(WEIGHT), entries.get(BIAS)
    if SCORE in entries and WEIGHT in entries:
        raise AdapterFormatError(f"The file has both {SCORE} and {WEIGHT}; keep one of them.")
    if raw.get("task_type") == "SEQ_CLS" and SCORE not in entries:
        raise AdapterFormatError(
            f'task_type is SEQ_CLS, but {SCORE} is not in the file; save the adapter with modules_to_save=["score"], '
            "which PEFT does by itself."
        )
    if raw.get("task_type") != "SEQ_CLS" and SCORE in entries:
        raise AdapterFormatError(f"The file has {SCORE}, but task_type is {raw.get('task_type')!r}, not SEQ_CLS.")
    rows = 0 if weight is None else _rows(weight, hidden)
    if bias is not None and bias.shape != (rows, 1):
        raise AdapterFormatError(f"{BIAS} has shape {list(bias.shape)}; the heads need {[rows, 1]}.")
    described = metadata.get(METADATA_KEY)
    if described is not None:
        heads = decode_heads(described, rows)
    elif weight is not None:
        heads = (_plain(rows),)
    else:
        heads = ()
    return HeadPlan(heads, weight, bias, raw), others


def with_heads(
    config: Mapping[str, Any], tensors: Mapping[str, Array], heads: HeadTensors | None
) -> tuple[dict[str, Any], dict[str, Array], dict[str, str]]:
    """An adapter's configuration, tensors and metadata as they are written, from the first two without its heads.

    Raises:
        ValueError: the heads and their tensors do not fit together.
    """
    if heads is None or not heads.heads:
        return dict(config), dict(tensors), {}
    rows = 0 if heads.weight is None else len(heads.weight)
    if heads.heads[-1].stop != rows or (heads.bias is not None and heads.bias.shape != (rows, 1)):
        raise ValueError(f"the heads have {heads.heads[-1].stop} rows, their weights {rows}.")
    metadata = {METADATA_KEY: encode_heads(heads.heads)}
    if heads.weight is None:
        return dict(config), dict(tensors), metadata
    if heads.bias is None and all(_is_plain(head) for head in heads.heads):
        own = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        return {**config, **own}, {**tensors, SCORE: heads.weight}, metadata
    found = {**tensors, WEIGHT: heads.weight}
    if heads.bias is not None:
        found[BIAS] = heads.bias
    return dict(config), found, metadata


def _is_plain(head: Head) -> bool:
    """Whether PEFT reads it as we do."""
    return head.kind != "embedding" and head.pooling == "last" and head.layer == -1 and not head.bias


def _plain(rows: int) -> Head:
    """What a head is that only PEFT describes: classes as transformers names them, or a number."""
    if rows == 1:
        return Head(name="score", kind="scalar", start=0, stop=1)
    labels = tuple(f"LABEL_{row}" for row in range(rows))
    return Head(name="score", kind="classification", start=0, stop=rows, labels=labels)


def _rows(entry: TensorEntry, hidden: int) -> int:
    if len(entry.shape) != 2 or entry.shape[1] != hidden or not 0 < entry.shape[0] <= MAX_ROWS:
        raise AdapterFormatError(
            f"{entry.name} has shape {list(entry.shape)}; this base needs [labels, {hidden}], with at most {MAX_ROWS} "
            "labels."
        )
    return entry.shape[0]


def _part(kind: RowKind, entry: TensorEntry, arrays: Mapping[str, Array]) -> AdapterPart:
    dtype, (array,) = alike(arrays, [entry])
    return AdapterPart.columns(kind, "", array, dtype=dtype)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)
