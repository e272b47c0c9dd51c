"""Adapters as files, made without PEFT so that every field can be wrong on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME
from tenora.adapters.safetensors_file import Array, write_file
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule

PREFIX = "base_model.model."
_SHAPES = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (48, 16),
    "self_attn.v_proj": (48, 16),
    "self_attn.o_proj": (48, 48),
    "mlp.gate_proj": (48, 112),
    "mlp.up_proj": (48, 112),
    "mlp.down_proj": (112, 48),
}
TARGETS = tuple(
    TargetModule(f"model.layers.{layer}.{name}", layer * 7 + i, *shape)
    for layer in range(3)
    for i, (name, shape) in enumerate(_SHAPES.items())
)

ROWS = TableRows(
    modules=TARGETS,
    blocks=tuple(f"model.layers.{layer}.{block}" for layer in range(3) for block in ("self_attn", "mlp")),
    layers=tuple(f"model.layers.{layer}" for layer in range(3)),
    hidden=48,
    kv=16,
    factors={f"model.layers.{layer}.mlp.down_proj": f"model.layers.{layer}.mlp.up_proj" for layer in range(3)},
)


def config(**changes: Any) -> dict[str, Any]:
    """A plain configuration with some fields changed."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/nowhere/at/all",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        **changes,
    }


def tensors(
    names: tuple[str, ...] = ("q_proj", "down_proj"),
    *,
    rank: int = 4,
    layers: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
) -> dict[str, Array]:
    """Float32 weights of every such module."""
    random = np.random.default_rng(seed)
    result: dict[str, Array] = {}
    for target in TARGETS:
        if target.name in names and int(target.path.split(".")[2]) in layers:
            result[f"{PREFIX}{target.path}.lora_A.weight"] = random.normal(size=(rank, target.in_features)).astype(
                np.float32
            )
            result[f"{PREFIX}{target.path}.lora_B.weight"] = random.normal(size=(target.out_features, rank)).astype(
                np.float32
            )
    return result


def save(directory: Path, fields: Mapping[str, Any], weights: Mapping[str, Array]) -> Path:
    """Write both files as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(fields))
    write_file(directory / WEIGHTS_NAME, weights)
    return directory


def raw_safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with any header and any stated length of it."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data
