"""Heads in an adapter's files: PEFT's classifiers mean the same to us, ours the same to PEFT, and none is ever lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from tenora.adapters.digest import digest_of
from tenora.adapters.head_files import HeadTensors
from tenora.adapters.heads import METADATA_KEY, Head
from tenora.adapters.peft_format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterReader,
    read_adapter,
    summarise,
    validate_files,
    write_adapter,
)
from tenora.adapters.prepared import prepare
from tenora.adapters.safetensors_file import write_file
from tenora.adapters.table_rows import RowKind
from tenora.adapters.weights import AdapterWeights
from tenora.errors import AdapterFormatError
from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora.training.spec import LoraSpec
from tenora_kernels.layout import LoraBatch, LoraTables, build_segments
from tests.adapters.files import PREFIX, ROWS, TARGETS, config, tensors

# PEFT and transformers disagree on a name that one of them deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
CPU = torch.device("cpu")
IDS = torch.tensor([5, 17, 200, 31, 8])
LORA = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
CLASSES = Head(name="topic", kind="classification", start=0, stop=3, labels=("a", "b", "c"))
REWARD = Head(name="reward", kind="scalar", start=3, stop=4, mean=0.5, std=2.0)


def classifier(base: Path, labels: int) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)


def peft_scores(base: Path, directory: Path, labels: int) -> torch.Tensor:
    model: Any = peft.PeftModelForSequenceClassification.from_pretrained(classifier(base, labels), directory)
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(input_ids=IDS[None]).logits[0]
    return scores


def our_scores(decoder: Decoder, weights: AdapterWeights) -> torch.Tensor:
    """Of every row of the heads, at the last token, from the tables that serve."""
    rows = table_rows(decoder.spec)
    ready = prepare(weights, rows, dtype=torch.float32, device=CPU)
    shape: dict[str, Sequence[int]] = {"in_features": rows.in_features, "out_features": rows.out_features}
    tables = LoraTables.empty(ready.values, **shape, slots=1, low_rank_rows=rows.low_rank)  # type: ignore[arg-type]
    tables.place(0, 0, ready.ranks, ready.scaling, flags=ready.flags)
    positions = torch.arange(len(IDS))
    lora = LoraBatch(tables, build_segments([0] * len(IDS)))
    context = ForwardContext(positions, decoder.rope(positions), PackedAttention([0, len(IDS)]), lora)
    with torch.no_grad():
        hidden = decoder(IDS, context)
        return hidden[-1] @ tables.a(rows.row(RowKind.HEAD), 0).t()  # type: ignore[no-any-return]  # untyped __call__


def modules(seed: int = 0) -> dict[str, tuple[Any, Any]]:
    made = tensors(seed=seed)
    paths = [target.path for target in TARGETS if target.name in LORA.target_modules]
    return {p: (made[f"{PREFIX}{p}.lora_A.weight"], made[f"{PREFIX}{p}.lora_B.weight"]) for p in paths}


def head_weights(rows: int) -> Any:
    return np.random.default_rng(4).normal(size=(rows, 48)).astype(np.float32)


def written(directory: Path, heads: HeadTensors) -> AdapterWeights:
    write_adapter(directory, base_model="tiny", lora=LORA, modules=modules(), heads=heads)
    return read_adapter(directory, ROWS, max_rank=64)


def test_a_classifier_that_peft_saves_gives_the_same_scores_here(tiny_base: Path, tmp_path: Path) -> None:
    names = ["q_proj", "v_proj", "up_proj"]
    asked = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type=peft.TaskType.SEQ_CLS)
    model: Any = peft.get_peft_model(classifier(tiny_base, 3), asked)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.3)
    model.save_pretrained(tmp_path)
    weights = read_adapter(tmp_path, ROWS, max_rank=64)
    labels = ("LABEL_0", "LABEL_1", "LABEL_2")
    assert weights.heads == (Head(name="score", kind="classification", start=0, stop=3, labels=labels),)
    decoder = load_decoder(tiny_base, device=CPU)
    torch.testing.assert_close(our_scores(decoder, weights), peft_scores(tiny_base, tmp_path, 3), rtol=1e-5, atol=1e-5)
    summary = summarise(tmp_path, ROWS, max_rank=64)
    assert summary.parameters * 4 == summary.nbytes == weights.nbytes
    assert summary.heads == weights.heads
    assert weights.config == summary.config == json.loads((tmp_path / CONFIG_NAME).read_bytes())


def test_several_heads_at_the_last_token_are_one_classifier_to_peft_and_come_back_as_they_were(
    tiny_base: Path, tmp_path: Path
) -> None:
    weight = head_weights(4)
    weights = written(tmp_path / "mine", HeadTensors((CLASSES, REWARD), weight))
    decoder = load_decoder(tiny_base, device=CPU)
    theirs = peft_scores(tiny_base, tmp_path / "mine", 4)
    torch.testing.assert_close(our_scores(decoder, weights), theirs, rtol=1e-5, atol=1e-5)
    assert weights.heads == (CLASSES, REWARD)
    model: Any = peft.PeftModelForSequenceClassification.from_pretrained(
        classifier(tiny_base, 4), tmp_path / "mine", is_trainable=True
    )
    model.save_pretrained(tmp_path / "theirs")
    again = read_adapter(tmp_path / "theirs", ROWS, max_rank=64)
    assert torch.equal(our_scores(decoder, again), our_scores(decoder, weights))
    (head,) = again.heads  # what PEFT does not know it cannot keep
    assert head.size == 4


def own(**changes: Any) -> Head:
    return Head(**{"name": "own", "kind": "classification", "start": 0, "stop": 2, "labels": ("x", "y"), **changes})


@pytest.mark.parametrize(
    "heads",
    [
        HeadTensors((own(pooling="mean"),), head_weights(2)),
        HeadTensors((own(layer=-3),), head_weights(2)),
        HeadTensors((own(bias=True),), head_weights(2), np.array([[1.0], [2.0]], np.float32)),
        HeadTensors((own(kind="embedding", labels=()),), head_weights(2)),
        HeadTensors((own(kind="embedding", labels=(), stop=0, pooling="mean"),), None),
    ],
    ids=["mean", "layer", "bias", "projection", "embedding"],
)
def test_heads_that_peft_cannot_read_as_they_are_come_back_and_peft_loads_the_rest(
    tiny_base: Path, tmp_path: Path, heads: HeadTensors
) -> None:
    weights = written(tmp_path / "mine", heads)
    assert weights.heads == heads.heads
    parts = {part.kind: part.a for part in weights.parts}
    assert parts.keys() == {
        kind for kind, own in ((RowKind.HEAD, heads.weight), (RowKind.HEAD_BIAS, heads.bias)) if own is not None
    }
    if heads.weight is not None:
        np.testing.assert_array_equal(parts[RowKind.HEAD], heads.weight)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, tmp_path / "mine")
    found = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").lora_A["default"].weight
    np.testing.assert_array_equal(found.detach().numpy(), modules()["model.layers.1.self_attn.q_proj"][0])


def test_what_a_head_is_belongs_to_the_digest(tmp_path: Path) -> None:
    digests = set()
    for name, label in (("one", "y"), ("two", "z")):
        write_adapter(
            tmp_path / name,
            base_model="tiny",
            lora=LORA,
            modules=modules(),
            heads=HeadTensors((own(labels=("x", label)),), head_weights(2)),
        )
        digests.add(digest_of(tmp_path / name))
    assert len(digests) == 2


def test_an_adapter_of_the_last_layers_names_them_and_peft_finds_it_whole(tiny_base: Path, tmp_path: Path) -> None:
    last = {path: pair for path, pair in modules().items() if ".0." not in path}
    write_adapter(tmp_path / "mine", base_model="tiny", lora=LORA, modules=last)
    assert json.loads((tmp_path / "mine" / CONFIG_NAME).read_bytes())["layers_to_transform"] == [1, 2]
    assert set(read_adapter(tmp_path / "mine", ROWS, max_rank=64).modules) == set(last)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(base, tmp_path / "mine")
    state = peft.get_peft_model_state_dict(model)
    assert state.keys() == safetensors.torch.load_file(tmp_path / "mine" / WEIGHTS_NAME).keys()


SEQ_CLS = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
SCORE = f"{PREFIX}score.weight"


def described(*heads: Head) -> dict[str, str]:
    return {METADATA_KEY: msgspec.json.encode(heads).decode()}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str], str]] = {
    "another width": (SEQ_CLS, {SCORE: np.zeros((3, 40), np.float32)}, {}, "this base needs [labels, 48]"),
    "too many labels": (SEQ_CLS, {SCORE: np.zeros((4097, 48), np.float16)}, {}, "with at most 4096 labels"),
    "no task": ({}, {SCORE: head_weights(2)}, {}, "but task_type is 'CAUSAL_LM', not SEQ_CLS"),
    "more in full": (
        {**SEQ_CLS, "modules_to_save": ["score", "embed_tokens"]},
        {SCORE: head_weights(2)},
        {},
        "modules_to_save names 'embed_tokens'; beside the low-rank weights only the head",
    ),
    "a bias": (
        SEQ_CLS,
        {SCORE: head_weights(2), f"{PREFIX}score.bias": np.zeros(2, np.float32)},
        {},
        "score.bias is a bias, which is not served",
    ),
    "rows that nobody describes": (SEQ_CLS, {SCORE: head_weights(5)}, described(CLASSES), "of 3 rows, and the file"),
    "labels that are missing": (
        SEQ_CLS,
        {SCORE: head_weights(3)},
        described(Head(name="h", kind="classification", start=0, stop=3, labels=("a",))),
        "head 'h' has 3 rows and 1 labels",
    ),
    "no description": (SEQ_CLS, {SCORE: head_weights(3)}, {METADATA_KEY: "{}"}, "does not describe heads"),
    "two places": (SEQ_CLS, {SCORE: head_weights(2), "tenora_heads.weight": head_weights(2)}, {}, "has both"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_are_refused(name: str, tmp_path: Path) -> None:
    changes, extra, metadata, reason = REFUSED[name]
    text = json.dumps(config(**changes)).encode()
    (tmp_path / CONFIG_NAME).write_bytes(text)
    write_file(tmp_path / WEIGHTS_NAME, {**tensors(), **extra}, metadata)
    with pytest.raises(AdapterFormatError) as read:
        AdapterReader(ROWS, max_rank=64).read(tmp_path)
    assert reason in read.value.message
    with pytest.raises(AdapterFormatError) as validated:
        validate_files(text, tmp_path / WEIGHTS_NAME, ROWS, max_rank=64)
    assert validated.value.message == read.value.message
