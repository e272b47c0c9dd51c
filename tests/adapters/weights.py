"""Random adapters in memory, for a base of three modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tenora.adapters.prepared import PreparedAdapter, prepare
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterWeights, LoraModule

TARGETS = (
    TargetModule("model.layers.0.self_attn.q_proj", 0, 6, 4),
    TargetModule("model.layers.0.self_attn.k_proj", 1, 6, 2),
    TargetModule("model.layers.0.mlp.down_proj", 2, 10, 6),
)

ROWS = TableRows(TARGETS)


def adapter(ranks: Sequence[int], seed: int = 0, dtype: str = "float32") -> AdapterWeights:
    """Random weights with a rank per target; 0 leaves the module out."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> Any:
        array = random.normal(size=shape).astype(np.float32)
        if dtype == "bfloat16":
            return (array.view(np.uint32) >> 16).astype(np.uint16)
        return array.astype(dtype)

    modules = {
        target.path: LoraModule(
            path=target.path,
            rank=rank,
            scaling=0.5 + seed + target.row,
            a=values(rank, target.in_features),
            b=values(target.out_features, rank),
            dtype=dtype,
        )
        for target, rank in zip(TARGETS, ranks, strict=True)
        if rank
    }
    names = tuple(target.name for target in TARGETS if target.path in modules)
    nbytes = sum(module.a.nbytes + module.b.nbytes for module in modules.values())
    return AdapterWeights(modules, max(ranks), names, {}, nbytes)


def prepared(weights: AdapterWeights, dtype: torch.dtype = torch.float32) -> PreparedAdapter:
    return prepare(weights, ROWS, dtype=dtype, device=torch.device("cpu"))
