"""Prefixes and prompts in the PEFT format: PEFT is the oracle for what is read, and loads what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tenora.adapters.kinds.virtual_tokens import prefix_files, prompt_files
from tenora.adapters.peft_format import CONFIG_NAME, read_adapter, summarise, write_files
from tenora.adapters.table_rows import RowKind
from tenora.adapters.weights import AdapterPart
from tenora.errors import AdapterFormatError
from tests.adapters.files import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")

CAUSAL: Any = {"task_type": "CAUSAL_LM"}
PREFIXES: dict[str, Callable[[], peft.PeftConfig]] = {
    "a prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=7, **CAUSAL),
    "one with a projection": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=20, **CAUSAL
    ),
    "a cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=7, num_frozen_tokens=1, **CAUSAL),
}
PROMPTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "a prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=20, **CAUSAL),
}


def load(base: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def saved(base: Path, config: peft.PeftConfig, directory: Path) -> peft.PeftModel:
    """Of a random adapter, as PEFT loads it again."""
    model = peft.get_peft_model(load(base), config)
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(directory)
    return peft.PeftModel.from_pretrained(load(base), directory)


def rows_of(parts: tuple[AdapterPart, ...], kind: RowKind) -> list[Any]:
    assert {part.kind for part in parts} == {kind}
    return [part.a for part in parts]


@torch.no_grad()
def layers_of(model: peft.PeftModel) -> list[Any]:
    """Keys and values of the virtual tokens, [P, 2 · kv] of each layer, as PEFT hands them to the base."""
    cache = model.get_prompt(batch_size=1)
    return [
        torch.cat([part[0].transpose(0, 1).flatten(1) for part in (layer.keys, layer.values)], dim=1).numpy()
        for layer in cache.layers
    ]


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_are_what_peft_gives_the_base(case: str, tiny_base: Path, tmp_path: Path) -> None:
    model = saved(tiny_base, PREFIXES[case](), tmp_path / "peft")
    weights = read_adapter(tmp_path / "peft", ROWS, max_rank=64)
    found = rows_of(weights.parts, RowKind.PREFIX)
    assert [part.path for part in weights.parts] == list(ROWS.layers)
    for ours, theirs in zip(found, layers_of(model), strict=True):
        assert np.array_equal(ours, theirs)
    summary = summarise(tmp_path / "peft", ROWS, max_rank=64)
    assert (summary.kind, summary.rank, summary.parameters) == ("prefix", 0, 7 * 3 * 2 * 16)
    assert summary.nbytes == 4 * summary.parameters

    write_files(tmp_path / "ours", *prefix_files("some/base", found, kv_heads=1))
    again = peft.PeftModel.from_pretrained(load(tiny_base), tmp_path / "ours")
    for ours, theirs in zip(found, layers_of(again), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_what_peft_gives_the_base(case: str, tiny_base: Path, tmp_path: Path) -> None:
    model = saved(tiny_base, PROMPTS[case](), tmp_path / "peft")
    weights = read_adapter(tmp_path / "peft", ROWS, max_rank=64)
    (found,) = rows_of(weights.parts, RowKind.PROMPT)
    assert np.array_equal(found, model.prompt_encoder["default"].embedding.weight.detach().numpy())
    summary = summarise(tmp_path / "peft", ROWS, max_rank=64)
    assert (summary.kind, summary.parameters) == ("prompt", 5 * 48)

    write_files(tmp_path / "ours", *prompt_files("some/base", found, layers=3, heads=3))
    again = peft.PeftModel.from_pretrained(load(tiny_base), tmp_path / "ours")
    with torch.no_grad():
        assert np.array_equal(found, again.get_prompt(batch_size=1)[0].numpy())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a width of another base": ({"token_dim": 64}, "token_dim is 64, but this base has keys in a layer of 16"),
    "no number of tokens": ({"num_virtual_tokens": None}, "num_virtual_tokens is None; it must be a whole number"),
    "no tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
    "more tokens than there are": ({"num_virtual_tokens": 8}, "prompt_embeddings has shape [7, 96], but this base and"),
    "an encoder and a decoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
    "a classifier": ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'"),
    "modules in full": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "a field of the future": ({"use_teleport": 7}, "use_teleport is 7, a field that this version does not know"),
    "tasks beside each other": ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "peft_type is 'MULTITASK_PROMPT_TUNING'"),
}


@pytest.fixture(scope="module")
def prefix(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prefix")
    saved(tiny_base, PREFIXES["a prefix"](), directory)
    return directory


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(case: str, prefix: Path) -> None:
    change, reason = REFUSED[case]
    fields = json.loads((prefix / CONFIG_NAME).read_text())
    try:
        (prefix / CONFIG_NAME).write_text(json.dumps(fields | change))
        with pytest.raises(AdapterFormatError) as raised:
            read_adapter(prefix, ROWS, max_rank=64)
    finally:
        (prefix / CONFIG_NAME).write_text(json.dumps(fields))
    assert reason in raised.value.message
    assert raised.value.message.endswith(".")
