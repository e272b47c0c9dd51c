"""Every kind that PEFT saves is served as PEFT computes it, and what is written of it PEFT loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch

from tenora.adapters.kinds.dora import dora_files
from tenora.adapters.kinds.ia3 import ia3_files
from tenora.adapters.kinds.vera import drawn, vera_files
from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, summarise, validate_files, write_files
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterWeights
from tenora.model.loading import load_decoder
from tenora.model.spec import ModelSpec, table_rows
from tenora.training.spec import LoraSpec
from tests.model.served import our_logits, peft_logits, read, save_random

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CAUSAL: Any = {"task_type": "CAUSAL_LM"}
BIASES = ("llama", {"attention_bias": True, "mlp_bias": True})
SMOLLM2: tuple[str, dict[str, Any]] = ("smollm2", {})
CASES: dict[str, tuple[str, tuple[str, dict[str, Any]], Callable[[], peft.PeftConfig]]] = {
    "the (IA)³ of the paper": (
        "ia3",
        SMOLLM2,
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
        ),
    ),
    "(IA)³ on everything, of a base with biases": (
        "ia3",
        BIASES,
        lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"], **CAUSAL),
    ),
    "(IA)³ without feed-forward modules": (
        "ia3",
        SMOLLM2,
        lambda: peft.IA3Config(target_modules=["down_proj", "q_proj"], feedforward_modules=[], **CAUSAL),
    ),
    "DoRA": ("dora", SMOLLM2, lambda: peft.LoraConfig(r=4, target_modules=ALL, use_dora=True, **CAUSAL)),
    "DoRA of a base with biases, ranks of their own and rsLoRA": (
        "dora",
        BIASES,
        lambda: peft.LoraConfig(
            r=6,
            target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
            rank_pattern={"v_proj": 2},
            use_dora=True,
            use_rslora=True,
            **CAUSAL,
        ),
    ),
    "VeRA": ("vera", SMOLLM2, lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], **CAUSAL)),
    "VeRA with its projections left out": (
        "vera",
        BIASES,
        lambda: peft.VeraConfig(
            r=8, target_modules=["k_proj", "up_proj"], save_projection=False, projection_prng_key=11, **CAUSAL
        ),
    ),
}


@pytest.fixture(params=list(CASES), scope="module")
def case(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """The name of the kind, the base, and an adapter that PEFT saved."""
    kind, (family, changes), config = CASES[request.param]
    base, directory = tiny(family, **changes), tmp_path_factory.mktemp(kind)
    save_random(base, config(), directory, lambda name: ".lora_" in name or "ia3_" in name or "lambda" in name)
    return kind, base, directory


def test_logits_are_those_of_peft(case: tuple[str, Path, Path]) -> None:
    """float32; the largest difference is at most 1e-5 of the largest logit."""
    kind, base, directory = case
    decoder = load_decoder(base)
    wanted, found = peft_logits(base, directory), our_logits(decoder, directory)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float((found - our_logits(decoder, None)).abs().max()) > 0.1
    summary = summarise(directory, table_rows(decoder.spec), max_rank=64)
    assert summary.kind == kind


def vectors(weights: AdapterWeights, kind: RowKind) -> dict[str, Any]:
    return {part.path: part.a.reshape(-1) for part in weights.parts if part.kind == kind}


def rewritten(weights: AdapterWeights, rows: TableRows, kind: str, lora: LoraSpec) -> tuple[Any, Any]:
    """What the writers make of an adapter as it was read."""
    modules = {path: (module.a, module.b) for path, module in weights.modules.items()}
    if kind == "ia3":
        return ia3_files("some/base", vectors(weights, RowKind.SCALE), rows)
    if kind == "dora":
        return dora_files("some/base", lora, modules, vectors(weights, RowKind.MAGNITUDE))
    ranks = {module.rank for module in weights.modules.values()}
    places = [module for module in rows.modules if module.path in modules]
    shared = drawn(5, *ranks, max(m.in_features for m in places), max(m.out_features for m in places))
    generator = np.random.default_rng(1)
    drawn_vectors = {
        m.path: (generator.normal(size=ranks.copy().pop()).astype(np.float32), np.ones(m.out_features, np.float32))
        for m in places
    }
    return vera_files("some/base", shared, drawn_vectors, seed=5)


def test_what_is_written_peft_loads_and_computes_alike(case: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, base, directory = case
    decoder = load_decoder(base)
    weights = read(decoder, directory)
    spec = LoraSpec(rank=weights.rank or 1, alpha=8.0, use_rslora=bool(weights.config.get("use_rslora")))
    write_files(tmp_path / "ours", *rewritten(weights, table_rows(decoder.spec), kind, spec))
    wanted, found = peft_logits(base, tmp_path / "ours"), our_logits(decoder, tmp_path / "ours")
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    if kind != "vera":  # of which a copy does not have the vectors any more
        before = our_logits(decoder, directory)
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


def test_an_upload_is_counted_as_it_lies_on_the_device(case: tuple[str, Path, Path]) -> None:
    _, base, directory = case
    rows = table_rows(ModelSpec.from_directory(base))
    config, file = (directory / CONFIG_NAME).read_bytes(), directory / WEIGHTS_NAME
    summary = validate_files(config, file, rows, max_rank=64)
    weights = read(load_decoder(base), directory)
    low_rank = sum(module.a.size + module.b.size for module in weights.modules.values())
    assert summary.parameters == low_rank + sum(part.a.size + part.bt.size for part in weights.parts)
    assert summary.nbytes == sum(tensor.nbytes for tensor in safetensors.torch.load_file(file).values())
    assert summary.rank == weights.rank == max((module.rank for module in weights.modules.values()), default=0)


@pytest.mark.parametrize("seed", [0, 11, 2**33 + 5])
def test_projections_are_drawn_as_torch_draws_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = peft.tuners.vera.model
    wanted = [model._kaiming_init(shape, generator) for shape in ((8, 112), (48, 8))]
    for ours, theirs in zip(drawn(seed, 8, 112, 48), wanted, strict=True):
        assert np.array_equal(ours, theirs.numpy())
