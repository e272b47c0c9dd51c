from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tenora.errors import UnsupportedModelError
from tenora.model.layout import LAYOUTS
from tenora.model.spec import FAMILIES, ModelSpec, target_modules
from tests.model.test_decoder import VARIANTS
from tests.support.tiny import FAMILIES as TINY


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_config_has_the_defaults_of_transformers(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    bare, full = ModelSpec.from_config({"model_type": family}), ModelSpec.from_config(config)
    assert bare == full
    assert bare.vocab_size == config.vocab_size
    assert bare.intermediate_size == config.intermediate_size
    assert bare.num_kv_heads == config.num_key_value_heads
    assert bare.max_position_embeddings == config.max_position_embeddings
    assert bare.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_json_and_the_transformers_object_agree(variant: str, tiny: Callable[..., Path]) -> None:
    family, overrides = VARIANTS[variant]
    directory = tiny(family, **overrides)
    config = transformers.AutoConfig.from_pretrained(directory)
    spec = ModelSpec.from_directory(directory)
    assert spec == ModelSpec.from_config(config)
    assert dict(spec.rope_parameters) == config.rope_parameters


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_last_layers_slide_where_layer_types_are_absent(family: str) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_hidden_layers": 5}
    windows = ModelSpec.from_config({"model_type": family, **fields}).sliding_window
    assert windows == (None, None, 8, 8, 8)
    assert windows == ModelSpec.from_config(transformers.AutoConfig.for_model(family, **fields)).sliding_window
    assert set(ModelSpec.from_config({"model_type": family, **fields, "use_sliding_window": False}).sliding_window) == {
        None
    }


def test_old_rope_fields_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    specs = [ModelSpec.from_config({"model_type": "llama", **fields}) for fields in (old, new)]
    assert [(spec.rope_type, spec.rope_parameters["rope_theta"], spec.rope_parameters["factor"]) for spec in specs] == [
        ("linear", 5e5, 2.0)
    ] * 2


def test_every_family_has_a_layout() -> None:
    assert LAYOUTS.keys() == FAMILIES.keys()


def test_target_modules_are_the_linear_layers_of_transformers(tiny: Callable[..., Path]) -> None:
    for family in TINY:
        directory = tiny(family)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        linears = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
        }
        targets = target_modules(ModelSpec.from_directory(directory))
        assert {target.path: (target.in_features, target.out_features) for target in targets} == linears
        assert [target.row for target in targets] == list(range(len(targets)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "qwen3_moe"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised (awq)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "not a multiple of 5"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_act": "swiglu"}, "activation 'swiglu'"),
        ({"head_dim": 7}, "head dimension 7 is odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 2]}}, "RoPE 'mrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 32}, "linear_attention"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        ModelSpec.from_config({"model_type": "llama", **fields})
    assert reason in caught.value.message
    assert "Mistral" in caught.value.message  # lists what is supported


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_an_unreadable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        ModelSpec.from_directory(tmp_path)


def test_the_api_process_can_import_spec_tokenizer_and_catalog_without_torch() -> None:
    code = (
        "import sys, tenora.model.spec, tenora.model.tokenizer, tenora.model.catalog\n"
        "print([name for name in ('torch', 'transformers', 'triton', 'numba') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


LENGTHS: dict[str, tuple[dict[str, Any], int]] = {
    "no scaling": ({"rope_type": "default"}, 64),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 256),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.5}, 160),
    "yarn, as Qwen's model cards add it": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        256,
    ),
    "yarn beside the stretched length": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        64,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
        64,
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "factor": 8.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 8,
        },
        64,
    ),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_rope_scaling_lengthens_the_context(case: str) -> None:
    rope, length = LENGTHS[case]
    fields = {"model_type": "llama", "max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4, **rope}}
    assert ModelSpec.from_config(fields).context_length == length


@pytest.mark.parametrize("factor", [0, -1, 0.5, "4", None, True, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(factor: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="factor"):
        ModelSpec.from_config({"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": factor}})
