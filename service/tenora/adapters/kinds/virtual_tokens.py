"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190) and prompt tuning (Lester et al. 2021, arXiv:2104.08691).

PEFT keeps of either `prompt_embeddings` alone, whatever made them while training: a projection or an LSTM is folded
into them when the adapter is saved. So P-tuning is prompt tuning, and a cartridge a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenora.adapters.kinds import fields
from tenora.adapters.kinds.kind import Kind
from tenora.adapters.kinds.tensors import Expected, alike, all_bfloat16
from tenora.adapters.safetensors_file import Array, TensorEntry
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, AdapterSummary, AdapterWeights
from tenora.errors import AdapterFormatError

_TENSOR = "prompt_embeddings"
MAX_VIRTUAL_TOKENS = 2**15
_PREFIXES, _PROMPTS = ("PREFIX_TUNING", "CARTRIDGE"), ("PROMPT_TUNING", "P_TUNING")
_READ = fields.DESCRIPTIVE | {
    *("peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"),
    "num_transformer_submodules",
    # How they were made while training, and how they began.
    *("encoder_hidden_size", "prefix_projection", "init_weights", "num_frozen_tokens"),
    *("encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
}
_UNSUPPORTED = {
    "modules_to_save": "modules that are trained in full are not served; train without modules_to_save",
    "auto_map": "code in an upload is never run; remove auto_map",
}


@dataclass(frozen=True, slots=True)
class VirtualTokensConfiguration:
    """See `tenora.adapters.kinds.kind.Configuration`.

    Attributes:
        kind: PREFIX or PROMPT.
        tokens: P, how many virtual tokens there are.
        width: columns of one in one place, if the configuration says so: of embeddings, or of keys in a layer.
    """

    kind: str
    tokens: int
    width: int | None
    raw: Mapping[str, Any]

    def plan(self, entries: Mapping[str, TensorEntry], rows: TableRows, *, max_rank: int) -> VirtualTokensPlan:  # noqa: ARG002  # the protocol's
        """See `tenora.adapters.kinds.kind.Configuration`; there are no ranks here."""
        row_kind = RowKind.PREFIX if self.kind == PREFIX.name else RowKind.PROMPT
        places = [rows.rows[row].path for row in rows.of(row_kind)]
        width, what = (rows.kv, "keys in a layer") if row_kind == RowKind.PREFIX else (rows.hidden, "embeddings")
        if self.width not in (None, width):
            raise AdapterFormatError(
                f"token_dim is {self.width}, but this base has {what} of {width}; it is made for another base."
            )
        per_place = 2 * width if row_kind == RowKind.PREFIX else width
        expected = Expected(entries)
        entry = expected.take(_TENSOR, (self.tokens, per_place * len(places)), "num_virtual_tokens")
        expected.refuse_others("this kind of adapter")
        summary = AdapterSummary(
            kind=self.kind,
            rank=0,
            target_modules=(),
            parameters=self.tokens * per_place * len(places),
            bfloat16=all_bfloat16([entry]),
            nbytes=entry.nbytes,
            config=self.raw,
        )
        return VirtualTokensPlan(row_kind, places, entry, summary)


@dataclass(frozen=True, slots=True)
class VirtualTokensPlan:
    """See `tenora.adapters.kinds.kind.Plan`; the one tensor has the columns of all places side by side."""

    row_kind: RowKind
    places: Sequence[str]
    entry: TensorEntry
    summary: AdapterSummary

    def weights(self, arrays: Mapping[str, Array]) -> AdapterWeights:
        """See `tenora.adapters.kinds.kind.Plan`."""
        dtype, (values,) = alike(arrays, [self.entry])
        columns = np.split(values, len(self.places), axis=1)
        parts = tuple(
            AdapterPart.columns(self.row_kind, path, part, dtype=dtype)
            for path, part in zip(self.places, columns, strict=True)
        )
        summary = self.summary
        return AdapterWeights({}, 0, (), summary.config, summary.nbytes, parts=parts)


def parse(raw: Mapping[str, Any]) -> VirtualTokensConfiguration:
    """Read and check the fields of such a configuration. Raises AdapterFormatError that names the field."""
    fields.require_causal_lm(raw)
    fields.refuse_unread(raw, _READ, _UNSUPPORTED)
    tokens, width, parts = raw.get("num_virtual_tokens"), raw.get("token_dim"), raw.get("num_transformer_submodules")
    if type(tokens) is not int or not 1 <= tokens <= MAX_VIRTUAL_TOKENS:
        raise AdapterFormatError(
            f"num_virtual_tokens is {fields.shown(tokens)}; it must be a whole number from 1 to {MAX_VIRTUAL_TOKENS}."
        )
    if width is not None and type(width) is not int:
        raise AdapterFormatError(f"token_dim is {fields.shown(width)}; it must be a whole number.")
    if parts not in (None, 1):
        raise AdapterFormatError(
            f"num_transformer_submodules is {fields.shown(parts)}: the bases served here are decoders and have 1; "
            "train on a decoder."
        )
    kind = PREFIX if raw["peft_type"] in _PREFIXES else PROMPT
    return VirtualTokensConfiguration(kind=kind.name, tokens=tokens, width=width, raw=raw)


PREFIX = Kind(name="prefix", title="A learned prefix", is_of=lambda raw: raw.get("peft_type") in _PREFIXES, parse=parse)
PROMPT = Kind(name="prompt", title="A learned prompt", is_of=lambda raw: raw.get("peft_type") in _PROMPTS, parse=parse)


def prefix_files(base_model: str, layers: Sequence[Array], *, kv_heads: int) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter_config.json and tensors of a prefix.

    Args:
        base_model: id of the base.
        layers: keys and values of the virtual tokens in each layer, [P, 2 · kv].
        kv_heads: heads of keys.
    """
    tokens, width = layers[0].shape[0], layers[0].shape[1] // 2
    config = {
        **_config(base_model, "PREFIX_TUNING", tokens, width, len(layers), kv_heads),
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }
    return config, {_TENSOR: np.concatenate(layers, axis=1)}


def prompt_files(
    base_model: str, embeddings: Array, *, layers: int, heads: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """An adapter_config.json and tensors of a prompt.

    Args:
        base_model: id of the base.
        embeddings: of the virtual tokens, [P, H].
        layers, heads: of the base.
    """
    tokens, width = embeddings.shape
    config = {**_config(base_model, "PROMPT_TUNING", tokens, width, layers, heads), "prompt_tuning_init": "RANDOM"}
    return config, {_TENSOR: embeddings}


def _config(base_model: str, peft_type: str, tokens: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
