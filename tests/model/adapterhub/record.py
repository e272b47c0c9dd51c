"""Makes the adapters and logits beside this file with AdapterHub's own library.

It pins an older transformers, so it runs in an environment of its own:

    python3 -m venv /tmp/adapterhub
    /tmp/adapterhub/bin/pip install 'torch==2.13.0' 'adapters==1.3.0'
    /tmp/adapterhub/bin/python tests/model/adapterhub/record.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
HIDDEN, MLP, KV, VOCABULARY, LAYERS = 32, 40, 16, 64, 3
IDS = np.random.default_rng(5).integers(0, VOCABULARY, 13)
CASES: dict[str, dict[str, Any]] = {
    "pfeiffer": {"config": "seq_bn", "reduction_factor": 8},
    "houlsby": {"config": "double_seq_bn", "reduction_factor": {"1": 2, "default": 5}},
    "parallel": {"config": "par_bn", "reduction_factor": 2, "non_linearity": "gelu", "mh_adapter": True},
    "pfeiffer-elsewhere": {
        "config": "seq_bn",
        "reduction_factor": 3.5,
        "non_linearity": "tanh",
        "leave_out": [1],
        "original_ln_after": False,
        "residual_before_ln": False,
        "scaling": 0.5,
    },
}


def write_base(directory: Path) -> Path:
    """A random Llama that depends on NumPy alone."""
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    norms = ["model.norm"]
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{path}.self_attn.{name}_proj": (KV, HIDDEN) for name in "kv"}
        shapes |= {f"{path}.mlp.{name}_proj": (MLP, HIDDEN) for name in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj"] = (HIDDEN, MLP)
        norms += [f"{path}.input_layernorm", f"{path}.post_attention_layernorm"]
    tensors = {f"{name}.weight": random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": random.uniform(0.7, 1.3, HIDDEN).astype(np.float32) for name in norms}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "hidden_act": "silu",
        "intermediate_size": MLP,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def main() -> None:
    """Record every case."""
    import torch
    from transformers import AutoModelForCausalLM

    import adapters

    logits: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder))
        for case, given in CASES.items():
            options = dict(given)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            adapters.init(model)
            model.add_adapter(case, config=adapters.AdapterConfig.load(options.pop("config"), **options))
            model.set_active_adapters(case)
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.named_parameters():
                if f".adapters.{case}." in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            model.save_adapter(folder + "/saved", case, use_safetensors=True, with_head=False)
            for name in ("adapter_config.json", "adapter.safetensors"):
                (HERE / case).mkdir(exist_ok=True)
                (HERE / case / name).write_bytes(Path(folder, "saved", name).read_bytes())
            with torch.no_grad():
                logits[case] = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    np.savez(HERE / "logits.npz", **logits)


if __name__ == "__main__":
    main()
