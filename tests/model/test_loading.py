from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenora.errors import ConfigurationError, UnsupportedModelError
from tenora.model import loading
from tenora.model.loading import load_decoder, resolve_device, resolve_dtype
from tenora.model.projection import Projection


@pytest.fixture
def checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of a tiny untied model."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def change(directory: Path, edit: Callable[[dict[str, Tensor]], Any], **config: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **config}))


def parameters(directory: Path, **options: Any) -> Mapping[str, Tensor]:
    """Vectors by their names, and the matrices of a dense decoder."""
    decoder = load_decoder(directory, **options)
    matrices = {f"{name}.weight": m.weight for name, m in decoder.named_modules() if isinstance(m, Projection)}
    matrices |= {"embed_tokens": decoder.embed_tokens, "lm_head": decoder.lm_head}
    return dict(decoder.named_parameters()) | {name: weight.values for name, weight in matrices.items()}


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_load_like_one_file(checkpoint: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_equal(parameters(tmp_path / "shards"), parameters(checkpoint))


def test_fused_weights_are_the_parts_in_order_and_frozen(checkpoint: Path) -> None:
    tensors, ours = load_file(checkpoint / "model.safetensors"), parameters(checkpoint)
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(ours["layers.1.blocks.0.qkv.weight"], torch.cat(parts))
    parts = [tensors[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(ours["layers.2.blocks.1.gate_up.weight"], torch.cat(parts))
    assert not any(parameter.requires_grad for parameter in ours.values())


def test_bfloat16_is_exact_in_float32_and_kept_in_bfloat16(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.update({name: x.bfloat16() for name, x in tensors.items()}))
    wide, narrow = parameters(checkpoint), parameters(checkpoint, dtype=torch.bfloat16)
    assert {x.dtype for x in wide.values()} == {torch.float32}
    assert {x.dtype for x in narrow.values()} == {torch.bfloat16}
    assert_equal(wide, {name: x.float() for name, x in narrow.items()})


def test_tied_embeddings_are_one_tensor(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"))
    assert decoder.lm_head is decoder.embed_tokens
    untied = load_decoder(tiny("llama"))
    assert not torch.equal(untied.lm_head.values, untied.embed_tokens.values)


def test_what_a_checkpoint_may_carry_besides(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_decoder(checkpoint)
    change(
        checkpoint,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    )
    decoder = load_decoder(checkpoint)
    assert decoder.lm_head is decoder.embed_tokens


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "config", "reason"),
    [
        (lambda t: t.pop(Q), {}, f"the tensor {Q} is missing"),
        (lambda t: t.pop("lm_head.weight"), {}, "the tensor lm_head.weight is missing"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), {}, f"{Q} has shape [63, 64], not [64, 64]"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), {}, f"{Q} has type I8, so it is quantised"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[Q].clone()}),
            {},
            "model.layers.3.mlp.up_proj.weight",
        ),
        (lambda t: t.update({Q.replace("weight", "bias"): torch.zeros(64)}), {}, "q_proj.bias is not part of a llama"),
        (lambda t: None, {"attention_bias": True}, "q_proj.bias is missing"),
        (lambda t: None, {"tie_word_embeddings": True}, "lm_head.weight differs from the embeddings"),
        (lambda t: None, {"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    edit: Callable[[dict[str, Tensor]], Any], config: dict[str, Any], reason: str, checkpoint: Path
) -> None:
    change(checkpoint, edit, **config)
    with pytest.raises(UnsupportedModelError) as caught:
        load_decoder(checkpoint)
    assert reason in caught.value.message
    assert "Qwen3" in caught.value.message  # lists what is supported


def test_missing_and_broken_files(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UnsupportedModelError, match="not a complete safetensors file"):
        load_decoder(checkpoint)
    weights.unlink()
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is missing"):
        load_decoder(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {Q: "../elsewhere.safetensors"}})
    )
    with pytest.raises(UnsupportedModelError, match="outside of its directory"):
        load_decoder(checkpoint)


def test_resolve_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == cpu
    with pytest.raises(ConfigurationError, match="--device cpu"):
        resolve_device("cuda")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "_cpu_multiplies_bf16", lambda native=native: native)
        assert resolve_dtype("auto", cpu) == expected
    assert resolve_dtype("float16", cpu) == torch.float16
    with pytest.raises(ConfigurationError, match="int8"):
        resolve_dtype("int8", cpu)
