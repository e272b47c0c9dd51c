"""What it takes to read an adapter from disk and to prepare it, and what checking its digest adds. Wall time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tenora.adapters.digest import digest_of
from tenora.adapters.peft_format import AdapterReader, write_adapter
from tenora.adapters.prepared import PreparedAdapter, prepare
from tenora.adapters.safetensors_file import Array
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.adapters.weights import AdapterWeights
from tenora.training.spec import LoraSpec

LAYERS, RANK, ROUNDS = 30, 16, 60
MODULES = {  # of SmolLM2-135M
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
TARGETS = tuple(
    TargetModule(f"model.layers.{layer}.{name}", layer * len(MODULES) + row, *shape)
    for layer in range(LAYERS)
    for row, (name, shape) in enumerate(MODULES.items())
)


def loading() -> Iterator[tuple[str, float]]:
    """Seconds of one load: the least and the middle of `ROUNDS`, the three ways in turn."""
    with tempfile.TemporaryDirectory() as parent:
        yield from _loading(Path(parent) / "adapter")


def _loading(directory: Path) -> Iterator[tuple[str, float]]:
    random = np.random.default_rng(0)
    modules = {
        target.path: (_bfloat16(random, RANK, target.in_features), _bfloat16(random, target.out_features, RANK))
        for target in TARGETS
    }
    write_adapter(directory, base_model="SmolLM2-135M", lora=LoraSpec(rank=RANK), modules=modules)
    digest = digest_of(directory)
    assert digest is not None
    reader = AdapterReader(TableRows(TARGETS), max_rank=RANK)

    def prepared(weights: AdapterWeights) -> PreparedAdapter:
        return prepare(weights, TableRows(TARGETS), dtype=torch.float32, device=torch.device("cpu"))

    ways: dict[str, Callable[[], object]] = {
        "unchecked": lambda: prepared(reader.read(directory)),
        "hashed beside it": lambda: reader.load(directory, digest, prepared),
        "hashed, then prepared": lambda: (digest_of(directory), prepared(reader.read(directory))),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - begun)
    for name, seconds in taken.items():
        yield f"an adapter of rank {RANK} read and prepared, {name}, least", min(seconds)
        yield f"an adapter of rank {RANK} read and prepared, {name}, median", float(np.median(seconds))


def _bfloat16(random: np.random.Generator, *shape: int) -> Array:
    return (random.normal(0, 0.01, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


CASES: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {"adapters": loading}
