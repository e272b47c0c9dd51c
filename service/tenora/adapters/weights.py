"""An adapter in memory, as it was read: what the rest of the service gets to know of a file. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenora.adapters.heads import Head
from tenora.adapters.safetensors_file import Array
from tenora.adapters.table_rows import RowKind


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The adapter of one linear module: delta weight = scaling · B · A.

    Attributes:
        path: `model.layers.0.self_attn.q_proj`.
        scaling: alpha / rank, or alpha / √rank for rsLoRA.
        a: [rank, in_features].
        b: [out_features, rank], as in the file.
        dtype: float32, float16 or bfloat16, of both; bfloat16 arrays are the bits as uint16. What the file has in
            float64, or in two types, is float32, as PEFT loads it.
    """

    path: str
    rank: int
    scaling: float
    a: Array
    b: Array
    dtype: str

    @property
    def bt(self) -> Array:
        """Bᵀ, [rank, out_features], a view."""
        return self.b.T


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What an adapter has in another row of the base than a module's low-rank one.

    Attributes:
        kind, path: which row.
        a: [r, in]; bt: [r, out], with `out` 0 for vectors and heads.
        scaling: what the row's term is multiplied with, where it is one.
        dtype: as of `LoraModule`.
    """

    kind: RowKind
    path: str
    a: Array
    bt: Array
    scaling: float = 1.0
    dtype: str = "float32"

    @classmethod
    def columns(cls, kind: RowKind, path: str, a: Array, *, dtype: str = "float32") -> AdapterPart:
        """A row that has A alone: a vector [1, n], a column [r, 1], heads, virtual tokens."""
        return cls(kind, path, a, np.empty((a.shape[0], 0), dtype=a.dtype), dtype=dtype)

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What an adapter is, without its weights.

    Attributes:
        kind: name of one of `tenora.adapters.kinds.table.KINDS`.
        rank: the highest of its modules.
        target_modules: last parts of the paths that it adapts (`q_proj`), in the order of the base.
        parameters: number of weights.
        bfloat16: whether all of them are bfloat16.
        nbytes: size of the weights in the file.
        config: adapter_config.json.
        heads: what reads its last hidden states.
    """

    kind: str
    rank: int
    target_modules: tuple[str, ...]
    parameters: int
    bfloat16: bool
    nbytes: int
    config: Mapping[str, Any]
    heads: tuple[Head, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A whole adapter in memory.

    Attributes:
        modules: low-rank terms by path, in the order of the base.
        rank, target_modules, config, nbytes: as in `AdapterSummary`.
        parts: whatever else it has.
        flags: bits of `LoraTables.flags` that its parts do not tell: activation, PARALLEL, WITH_RESIDUAL, BIAS_OUTSIDE.
        heads: what reads its last hidden states.
    """

    modules: Mapping[str, LoraModule]
    rank: int
    target_modules: tuple[str, ...]
    config: Mapping[str, Any]
    nbytes: int
    parts: tuple[AdapterPart, ...] = ()
    flags: int = 0
    heads: tuple[Head, ...] = ()

    @property
    def invocation(self) -> tuple[int, ...]:
        """The tokens from which on it acts (`tenora.adapters.invocation`); empty: on all."""
        return tuple(self.config.get("alora_invocation_tokens") or ())
