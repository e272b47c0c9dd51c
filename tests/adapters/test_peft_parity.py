"""PEFT is the oracle: what it saves means the same to us, what we write means the same to it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter, validate_files, write_adapter
from tenora.adapters.safetensors_file import Array
from tenora.adapters.weights import AdapterWeights, LoraModule
from tenora.errors import AdapterFormatError
from tests.adapters.files import ROWS, TARGETS

# PEFT and transformers disagree on a name that one of them deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def load(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def base(tiny_base: Path) -> transformers.PreTrainedModel:
    return load(tiny_base)


def randomise(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Random low-rank weights, B included, in `dtype`."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.3).to(dtype)


def peft_deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's own scaling · B · A per module path."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def as_tensor(module: LoraModule, array: Array) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.view(torch.bfloat16) if module.dtype == "bfloat16" else tensor).float()


def our_deltas(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    return {
        path: module.scaling * as_tensor(module, module.b) @ as_tensor(module, module.a)
        for path, module in weights.modules.items()
    }


def assert_same_deltas(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert set(ours) == set(theirs)
    for path, delta in theirs.items():
        torch.testing.assert_close(ours[path], delta.float(), rtol=tolerance, atol=tolerance)
        assert float(delta.abs().max()) > 0.01


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "two modules": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"},
    "rsLoRA": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["o_proj", "up_proj"]},
    "some layers": {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "an expression": {"r": 2, "target_modules": r".*\.layers\.[12]\.mlp\.(gate|up)_proj"},
    "full paths": {"r": 2, "target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"]},
    "exclusions": {"r": 2, "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "an excluded expression": {"r": 2, "target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 6, "model.layers.0.self_attn.k_proj": 1},
        "alpha_pattern": {"layers.2.mlp.down_proj": 64, "down_proj": 1, r"(k|v)_proj": 5},
    },
    "rsLoRA with patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3},
    },
    "gaussian start": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


@pytest.mark.filterwarnings("ignore:.*rsLoRA.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*use_rslora.*:UserWarning")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_adapters_that_peft_saves(
    name: str, base: transformers.PreTrainedModel, tiny_base: Path, tmp_path: Path
) -> None:
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGURATIONS[name]))
    randomise(model)
    model.save_pretrained(tmp_path)
    weights = read_adapter(tmp_path, ROWS, max_rank=64)
    # The saved adapter as PEFT loads it is what counts: saving sorts the patterns, and with them which one wins.
    assert_same_deltas(our_deltas(weights), peft_deltas(peft.PeftModel.from_pretrained(load(tiny_base), tmp_path)))
    assert weights.rank == max(module.rank for module in weights.modules.values())
    assert list(weights.modules) == [target.path for target in TARGETS if target.path in weights.modules]
    summary = validate_files((tmp_path / CONFIG_NAME).read_bytes(), tmp_path / WEIGHTS_NAME, ROWS, max_rank=64)
    assert (summary.rank, summary.target_modules) == (weights.rank, weights.target_modules)
    assert summary.nbytes == weights.nbytes == sum(m.a.nbytes + m.b.nbytes for m in weights.modules.values())
    assert summary.parameters * 4 == summary.nbytes


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, "bfloat16")]
)
def test_every_weight_type(dtype: torch.dtype, name: str, base: transformers.PreTrainedModel, tmp_path: Path) -> None:
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomise(model, dtype)
    model.save_pretrained(tmp_path)
    weights = read_adapter(tmp_path, ROWS, max_rank=64)
    assert {module.dtype for module in weights.modules.values()} == {name}
    randomise(model)  # PEFT's own product would round in the narrow type; ours is compared with the rounded factors
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(dtype).float()
    assert_same_deltas(our_deltas(weights), peft_deltas(model))


TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("a_type", TYPES)
@pytest.mark.parametrize("b_type", TYPES)
def test_a_and_b_may_differ_in_their_float_type(
    a_type: torch.dtype, b_type: torch.dtype, base: transformers.PreTrainedModel, tiny_base: Path, tmp_path: Path
) -> None:
    """float64 included: both are the float32 values that PEFT computes with."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_NAME)
    tensors = {name: value.to(a_type if ".lora_A." in name else b_type) for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_NAME)
    ours = our_deltas(read_adapter(tmp_path, ROWS, max_rank=64))
    assert_same_deltas(ours, peft_deltas(peft.PeftModel.from_pretrained(load(tiny_base), tmp_path)))
    summary = validate_files((tmp_path / CONFIG_NAME).read_bytes(), tmp_path / WEIGHTS_NAME, ROWS, max_rank=64)
    assert summary.bfloat16 == (a_type == b_type == torch.bfloat16)


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "r and lora_alpha left out": ({"r": 8, "lora_alpha": 8}, {"r": ..., "lora_alpha": ...}),
    "a name that the base lacks beside others": (
        {"r": 3},
        {"target_modules": ["q_proj", "c_attn", "layers.9.up_proj"]},
    ),
    "a look-ahead": ({"r": 3}, {"target_modules": r"^(?!.*(?:visual|layers\.1)).*\.(q|k)_proj$"}),
    "two look-aheads": ({"r": 3}, {"target_modules": r"(?=model\.)(?!.*mlp).*\.[qk]_proj"}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_configurations_that_others_write(
    case: str, base: transformers.PreTrainedModel, tiny_base: Path, tmp_path: Path
) -> None:
    trained, written = BY_HAND[case]
    names = written.get("target_modules", ["q_proj"])
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=names, **trained))
    randomise(model)
    model.save_pretrained(tmp_path)
    fields = {**json.loads((tmp_path / CONFIG_NAME).read_text()), **written}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    theirs = peft_deltas(peft.PeftModel.from_pretrained(load(tiny_base), tmp_path))
    assert_same_deltas(our_deltas(read_adapter(tmp_path, ROWS, max_rank=64)), theirs)


def test_the_keys_of_configurations_by_hand(base: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """PEFT saves what "all-linear" became; a configuration may also say it in so many words."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    randomise(model)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG_NAME).read_text())
    minimal = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": "all-linear"}
    assert set(fields["target_modules"]) == {target.name for target in TARGETS}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(minimal))
    assert_same_deltas(our_deltas(read_adapter(tmp_path, ROWS, max_rank=64)), peft_deltas(model))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "a bias of the low-rank layers": ({"lora_bias": True}, "lora_bias is True"),
    "the head in full": ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "trained tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices is"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names 'embed_tokens'"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names 'lm_head'"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns about some of these itself
@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_peft_saves_and_that_are_refused(
    name: str, base: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    change, reason = REFUSED[name]
    peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **change})).save_pretrained(
        tmp_path
    )
    with pytest.raises(AdapterFormatError, match=reason):
        read_adapter(tmp_path, ROWS, max_rank=64)


def test_another_method_is_refused(base: transformers.PreTrainedModel, tmp_path: Path) -> None:
    config = peft.LoHaConfig(target_modules=["k_proj", "down_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match="peft_type is 'LOHA'; adapters of the kinds"):
        read_adapter(tmp_path, ROWS, max_rank=64)


@dataclass(frozen=True)
class Shape:
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ("q_proj", "down_proj")
    use_rslora: bool = False
    invocation: tuple[int, ...] = ()


def random_modules(rank_of: Callable[[str], int], names: tuple[str, ...]) -> dict[str, tuple[Array, Array]]:
    random = np.random.default_rng(1)
    return {
        target.path: (
            random.normal(size=(rank_of(target.path), target.in_features)).astype(np.float32),
            random.normal(size=(target.out_features, rank_of(target.path))).astype(np.float32),
        )
        for target in TARGETS
        if target.name in names
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.filterwarnings("ignore:.*rsLoRA.*:UserWarning")
def test_adapters_that_we_write(
    use_rslora: bool, mixed: bool, base: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    shape = Shape(alpha=6.5, use_rslora=use_rslora)
    modules = random_modules(lambda path: 7 if mixed and ".1." in path else 4, shape.target_modules)
    write_adapter(tmp_path / "adapter", base_model="some/base", lora=shape, modules=modules)
    ours = read_adapter(tmp_path / "adapter", ROWS, max_rank=64)
    for path, (a, b) in modules.items():
        assert np.array_equal(ours.modules[path].a, a)
        assert np.array_equal(ours.modules[path].bt, b.T)
    with warnings.catch_warnings():
        # A missing or an unexpected key is a warning of PEFT's.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_deltas(our_deltas(ours), peft_deltas(model))
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == ("some/base", 4, 6.5)
    assert config.task_type == "CAUSAL_LM"


def test_exported_adapters_give_the_same_logits(base: transformers.PreTrainedModel, tmp_path: Path) -> None:
    names = tuple(dict.fromkeys(target.name for target in TARGETS))
    modules = random_modules(lambda _: 4, names)
    write_adapter(tmp_path / "a", base_model="b", lora=Shape(target_modules=names), modules=modules)
    ids = torch.tensor([[5, 9, 33, 100]])
    state = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a")(ids).logits
        merged = transformers.AutoModelForCausalLM.from_config(base.config)
        merged.load_state_dict(state)
        merged.eval()
        plain = merged(ids).logits
        for path, delta in our_deltas(read_adapter(tmp_path / "a", ROWS, max_rank=64)).items():
            merged.get_submodule(path).weight += delta
        ours = merged(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((ours - plain).abs().max()) > 0.1


def test_written_adapters_are_never_replaced(tmp_path: Path) -> None:
    modules = random_modules(lambda _: 4, ("q_proj", "down_proj"))
    write_adapter(tmp_path / "a", base_model="b", lora=Shape(), modules=modules)
    before = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    with pytest.raises(FileExistsError):
        write_adapter(tmp_path / "a", base_model="other", lora=Shape(), modules=modules)
    assert (tmp_path / "a" / WEIGHTS_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "nothing half-written stays"


def test_half_precision_is_written_as_it_is(tmp_path: Path) -> None:
    bits = np.arange(4 * 48, dtype=np.uint16).reshape(4, 48)
    modules = {t.path: (bits, bits.T.copy()) for t in TARGETS if t.name == "q_proj"}
    write_adapter(tmp_path / "a", base_model="b", lora=Shape(target_modules=("q_proj",)), modules=modules)
    module = read_adapter(tmp_path / "a", ROWS, max_rank=64).modules["model.layers.2.self_attn.q_proj"]
    assert module.dtype == "bfloat16"
    assert np.array_equal(module.a, bits)


def test_modules_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    good = random_modules(lambda _: 4, ("q_proj",))
    path, (a, b) = next(iter(good.items()))
    for modules, names in (
        ({path: (a, b[:, :3])}, ("q_proj",)),
        ({path: (a[0], b)}, ("q_proj",)),
        ({path: (a.astype(np.float64), b.astype(np.float64))}, ("q_proj",)),
        ({path: (a, b.astype(np.float16))}, ("q_proj",)),
        (good, ("q_proj", "k_proj")),
    ):
        with pytest.raises(ValueError, match="q_proj"):
            write_adapter(tmp_path / "a", base_model="b", lora=Shape(target_modules=names), modules=modules)
        assert not list(tmp_path.iterdir())
