"""What a base model looks like: the numbers of its `config.json`, checked and completed.

Free of torch and transformers.

The defaults of each family are those of the transformers configuration class of the same `model_type`, so that a
`config.json` that leaves a field out means the same here as there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.errors import UnsupportedModelError
from tenora.model.layout import LAYOUTS, Layout, Matrix, Sizes

FAMILIES: dict[str, str] = {
    "llama": "Llama 2 and 3, SmolLM2 and other models of type 'llama'",
    "mistral": "Mistral",
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3 (dense)",
}
SUPPORTED = (
    "Tenora serves dense, unquantised decoders of these families: "
    + ", ".join(f"{text} ({name})" for name, text in FAMILIES.items())
    + "."
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_LARGEST_FACTOR = 1e6
_STRETCHING = ("linear", "dynamic", "yarn")  # the context is longer by their factor
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
READABLE: frozenset[str] = frozenset()
"""`quant_method`s of checkpoints that a kind of weights reads."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
_COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_window_layers": 28,
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a frozen decoder.

    Attributes:
        family: `model_type` of the configuration, a key of `FAMILIES`.
        attention_bias: the q, k and v projections have a bias.
        o_bias: the output projection has one; mlp_bias: the three MLP projections have one.
        qk_norm: q and k go through an RMSNorm over the head dimension before RoPE (Qwen3).
        sliding_window: per layer, how many positions a token sees, itself included; None is all of them.
        rope_parameters: transformers' `rope_parameters` in standard form (`rope_type`, `rope_theta`, …).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: str
    sliding_window: tuple[int | None, ...]
    rope_parameters: Mapping[str, Any] = field(hash=False)

    @property
    def layout(self) -> Layout:
        """What a layer is made of."""
        sizes = Sizes(
            hidden=self.hidden_size,
            mlp=self.intermediate_size,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            attention_bias=self.attention_bias,
            o_bias=self.o_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=self.qk_norm,
        )
        return LAYOUTS[self.family](sizes)

    @property
    def embedding(self) -> Matrix:
        """The matrix [vocabulary, hidden] of the tokens."""
        return Matrix(self.hidden_size, ((self.layout.embedding, self.vocab_size),))

    @property
    def head(self) -> Matrix:
        """The matrix of the scores; the same one where the two are tied."""
        if self.tie_word_embeddings:
            return self.embedding
        return Matrix(self.hidden_size, ((self.layout.head, self.vocab_size),))

    @property
    def q_size(self) -> int:
        """Columns of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (or value) projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def rope_type(self) -> str:
        """One of `ROPE_TYPES`."""
        return str(self.rope_parameters["rope_type"])

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the model is made for, its RoPE scaling included.

        `linear`, `dynamic` and `yarn` stretch the length that the model was trained with by their factor, whatever
        `max_position_embeddings` says beside them (often the length before the scaling was added). `llama3` and
        `longrope` come with configurations that name the stretched length. vLLM derives it so, too.
        """
        if self.rope_type not in _STRETCHING:
            return self.max_position_embeddings
        original = self.rope_parameters.get("original_max_position_embeddings") or self.max_position_embeddings
        return int(original * self.rope_parameters["factor"])

    @property
    def context_reason(self) -> str:
        """Where `context_length` comes from, for whoever asked for more."""
        if self.rope_type not in _STRETCHING:
            return "max_position_embeddings of its config.json"
        original = self.rope_parameters.get("original_max_position_embeddings") or self.max_position_embeddings
        return f"{original} times the factor {self.rope_parameters['factor']:g} of its {self.rope_type} RoPE scaling"

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Read a transformers configuration, or the dict of a `config.json`.

        Raises:
            UnsupportedModelError: another family, a quantised checkpoint, or values that do not fit together.
        """
        given: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        family = _family(given)
        # A null is a value of its own only for the window: elsewhere it means "the default".
        known = {key: value for key, value in given.items() if value is not None or key == "sliding_window"}
        values = {**_COMMON, **_DEFAULTS[family], **known}
        heads = _positive(values, "num_attention_heads")
        hidden = _positive(values, "hidden_size")
        layers = _positive(values, "num_hidden_layers")
        kv_heads = _positive({"num_key_value_heads": heads, **values}, "num_key_value_heads")
        if heads % kv_heads:
            raise _unsupported(f"{heads} attention heads are not a multiple of {kv_heads} key-value heads")
        attention_bias = bool(values.get("attention_bias", False))
        if values["hidden_act"] not in ACTIVATIONS:
            raise _unsupported(f"the activation {values['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
        head_dim = _positive({"head_dim": hidden // heads, **values}, "head_dim")
        if head_dim % 2:
            raise _unsupported(f"the head dimension {head_dim} is odd, which RoPE cannot rotate")
        return cls(
            family=family,
            vocab_size=_positive(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(values, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_positive(values, "max_position_embeddings"),
            rms_norm_eps=float(values["rms_norm_eps"]),
            tie_word_embeddings=bool(values["tie_word_embeddings"]),
            attention_bias=family == "qwen2" or (family != "mistral" and attention_bias),
            o_bias=family in {"llama", "qwen3"} and attention_bias,
            mlp_bias=family == "llama" and bool(values.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            hidden_act=values["hidden_act"],
            sliding_window=_windows(family, values, layers),
            rope_parameters=_rope_parameters(values),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> ModelSpec:
        """Read the `config.json` of a Hugging Face directory.

        Raises:
            UnsupportedModelError: as `from_config`, or a file is missing or not JSON.
        """
        return cls.from_config(read_json(directory / "config.json", required=True))


def target_modules(spec: ModelSpec) -> tuple[TargetModule, ...]:
    """Every module that an adapter may change, layer after layer; its row is its place here."""
    layout = spec.layout
    every = (found for layer in range(spec.num_layers) for found in layout.paths(layer))
    return tuple(
        TargetModule(path=path, row=row, in_features=site.input, out_features=module.output)
        for row, (path, site, module) in enumerate(every)
    )


def table_rows(spec: ModelSpec) -> TableRows:
    """Every row that an adapter of this base can fill."""
    layout = spec.layout
    return TableRows(
        modules=target_modules(spec),
        blocks=tuple(layout.path(layer, block.name) for layer in range(spec.num_layers) for block in layout.blocks),
        layers=tuple(layout.path(layer) for layer in range(spec.num_layers)),
        hidden=spec.hidden_size,
        kv=spec.kv_size,
        factors={
            layout.path(layer, block.name, module.name): layout.path(layer, block.name, site.factor)
            for layer in range(spec.num_layers)
            for block in layout.blocks
            for site in block.sites
            for module in site.modules
            if site.factor
        },
        cached=tuple(
            layout.path(layer, block.name, name)
            for layer in range(spec.num_layers)
            for block in layout.blocks
            for site in block.sites
            for name in site.cached
        ),
    )


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file of a model directory; an absent file is an empty object unless it is `required`.

    Raises:
        UnsupportedModelError: the file is missing though required, or does not hold a JSON object.
    """
    if not path.exists() and not required:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _unsupported(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _unsupported(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _unsupported(f"{path} does not hold a JSON object")
    return value


def _unsupported(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The base model cannot be used: {reason}. {SUPPORTED}")


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise _unsupported(f"its model_type is {family!r}")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        if method not in READABLE:
            raise _unsupported(f"its weights are quantised ({method}); use the unquantised checkpoint")
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise _unsupported(f"its architecture {architectures[0]!r} is not a causal language model")
    return str(family)


def _positive(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _unsupported(f"{name} is {value!r} in its config.json, which is not a positive integer")
    return value


def _windows(family: str, values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layers
    window = None if values["sliding_window"] is None else _positive(values, "sliding_window")
    if family == "mistral":
        return (window,) * layers
    if not values.get("use_sliding_window", False):
        window = None
    # As transformers' Qwen2Config: without layer_types the *last* layers slide, from max_window_layers on.
    kinds = values.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= values["max_window_layers"] else "full_attention"
        for layer in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise _unsupported(f"its layer_types {sorted(set(kinds))} are not {layers} of full or sliding attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' standard form of old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) configurations."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope_type = rope.setdefault("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES or any(isinstance(value, Mapping) for value in rope.values()):
        raise _unsupported(f"its RoPE {rope_type!r} is not one of {', '.join(ROPE_TYPES)} for all layers")
    if rope.setdefault("rope_theta", values.get("rope_theta", 10000.0)) is None:
        rope["rope_theta"] = 10000.0
    factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if factor not in {None, 1}:
        raise _unsupported(f"it rotates only part of each head (partial_rotary_factor {factor})")
    if rope_type in {"llama3", "yarn", "longrope"}:
        if "original_max_position_embeddings" in values:
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "longrope": ("long_factor", "short_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    for name in needed.get(rope_type, ()):
        if name not in rope:
            raise _unsupported(f"its {rope_type} RoPE lacks {name}")
    scale = rope.get("factor", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale <= _LARGEST_FACTOR:
        raise _unsupported(f"the factor of its {rope_type} RoPE is {scale!r}, which is not a number from 1 on")
    return rope
