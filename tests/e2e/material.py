"""What the tests send: training rows, random adapters, questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SHAPES = (
    (4, ATTENTION),
    (8, ATTENTION + MLP),
    (16, MLP),
    (3, ("q_proj", "v_proj")),
    (8, ("down_proj",)),
    (32, ATTENTION + MLP),
    (1, ("gate_proj", "o_proj")),
    (6, ("k_proj", "up_proj")),
)
"""Ranks and target modules of eight adapters, no two alike."""


def sides(config: dict[str, int], module: str) -> tuple[int, int]:
    """(in, out) features of a projection."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }[module]


def write_adapter(directory: Path, base: Path, seed: int, rank: int = 8, modules: Sequence[str] = ATTENTION) -> Path:
    """A random PEFT adapter of `base`, strong enough to change what a tiny model says; returns `directory`."""
    config = json.loads((base / "config.json").read_text())
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            part = "self_attn" if module in ATTENTION else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{part}.{module}"
            inputs, outputs = sides(config, module)
            tensors[f"{prefix}.lora_A.weight"] = generator.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, rank**-0.5, (outputs, rank)).astype(np.float32)
    directory.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def write_rows(path: Path, rows: int, reply: str = "Ruling: {}.") -> Path:
    """A chat file of short rows; returns `path`."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Question {i}?"},
                    {"role": "assistant", "content": reply.format(i % 7)},
                ]
            }
        )
        for i in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def head_of(source: Path, path: Path, rows: int) -> Path:
    """The first rows of a file as a file of their own; returns `path`."""
    path.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    return path


def ask(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]
