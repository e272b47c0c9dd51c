"""Training prefix tuning and prompt tuning: PEFT's losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from tenora.adapters.table_rows import RowKind
from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.model.executors.layers import Keep
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora.training.arena import TrainedAdapter, TrainingArena
from tenora.training.packing import microbatches, pack, shared_prefix
from tenora.training.pass_queue import Work
from tenora.training.spec import LoraSpec
from tenora.training.step import Part, forward, load_pass
from tenora_kernels.cpu.runtime.team import Team
from tests.data.rows import random_rows
from tests.engine.driver import peft_warnings
from tests.training.test_step import finish, load, make_adapter, train

CONFIGS: dict[RowKind, Callable[..., Any]] = {
    RowKind.PREFIX: peft.PrefixTuningConfig,
    RowKind.PROMPT: peft.PromptTuningConfig,
}
COUNT = 5


@pytest.fixture(autouse=True)
def _no_grad() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


def rows_alike(rows: int = 4, beginning: int = 6) -> TokenizedDataset:
    """Random rows that begin with the same tokens, of which none is learned."""
    random = np.random.default_rng(7)
    bodies = [random.integers(3, 300, length) for length in range(4, 4 + rows)]
    tokens = [np.array([*range(20, 20 + beginning), *body], np.int32) for body in bodies]
    weights = [np.array([0] * (beginning + 2) + [1] * (len(body) - 2), np.uint8) for body in bodies]
    return TokenizedDataset(
        tokens=np.concatenate(tokens),
        weights=np.concatenate(weights),
        offsets=np.cumsum([0, *map(len, tokens)]).astype(np.int64),
        lines=np.arange(1, rows + 1, dtype=np.int64),
    )


DATASETS = {"no two rows alike": random_rows(5, seed=2), "a shared beginning": rows_alike()}


def virtual_adapter(decoder: Decoder, kind: RowKind, arena: TrainingArena | None = None) -> TrainedAdapter:
    """Random virtual tokens in an arena."""
    rows = table_rows(decoder.spec)
    arena = arena or TrainingArena(rows, device=decoder.device)
    adapter = TrainedAdapter(arena, LoraSpec(), [COUNT if row in rows.of(kind) else 0 for row in range(len(rows))])
    arena._rebuild([*arena._adapters, adapter])
    adapter.weights.copy_(torch.randn(adapter.numel, generator=torch.Generator().manual_seed(1)) * 0.7)
    return adapter


def matrices(adapter: TrainedAdapter, kind: RowKind, *, gradient: bool = False) -> torch.Tensor:
    """What PEFT has as its one embedding: rows of all layers side by side."""
    of = adapter.tables.grad_a if gradient else adapter.tables.a
    return torch.cat([of(row, adapter.slot) for row in adapter.rows.of(kind)], dim=1)


def oracle(directory: Path, kind: RowKind, adapter: TrainedAdapter) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with peft_warnings():
        model = peft.get_peft_model(base, CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    model.prompt_encoder["default"].embedding.weight.copy_(matrices(adapter, kind))
    return model.eval()


def losses_of(model: Any, dataset: TokenizedDataset) -> list[torch.Tensor]:
    """Per row, PEFT's losses of its learned tokens."""
    found = []
    for row in range(len(dataset)):
        tokens, weights = dataset.row(row)
        ids = torch.from_numpy(tokens.astype(np.int64))
        with peft_warnings():
            logits = model(input_ids=ids[None]).logits[0, -len(ids) : -1]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(weights[1:].astype(bool))])
    return found


@pytest.mark.parametrize("rows", DATASETS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("family", "team", "keep"),
    [
        ("smollm2", None, Keep.ALL),
        ("smollm2", Team(1), Keep.ALL),
        ("smollm2", Team(1), Keep.INPUTS),
        ("mistral", None, Keep.INPUTS),
    ],
    ids=["modules", "compiled", "layers run twice", "a sliding window"],
)
def test_losses_and_gradients_equal_peft(
    make_tiny: Callable[..., Path], rows: str, kind: RowKind, family: str, team: Team | None, keep: Keep
) -> None:
    directory, dataset = make_tiny(family), DATASETS[rows]
    decoder = load_decoder(directory, team=team)
    adapter = virtual_adapter(decoder, kind)
    model = oracle(directory, kind, adapter)
    with torch.enable_grad():
        losses = losses_of(model, dataset)
        (torch.cat(losses).sum() / dataset.num_trained).backward()
    shared = shared_prefix(dataset)
    assert (shared > 1) == (rows == "a shared beginning")
    found: dict[int, torch.Tensor] = {}
    for packed in microbatches(dataset, range(len(dataset)), 30, shared=shared):
        told = train(decoder, load(decoder, packed, adapter), 1 / dataset.num_trained, keep=keep)
        found |= {row: told.loss[torch.from_numpy(packed.target_row == at)] for at, row in enumerate(packed.rows)}
    for row, loss in enumerate(losses):
        torch.testing.assert_close(found[row], loss.detach(), rtol=1e-6, atol=1e-5)
    want = model.prompt_encoder["default"].embedding.weight.grad
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(matrices(adapter, kind, gradient=True), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_base_beside_them_sees_no_virtual_tokens(tiny_base: Path, kind: RowKind) -> None:
    decoder, dataset = load_decoder(tiny_base), DATASETS["a shared beginning"]
    adapter, packed = virtual_adapter(decoder, kind), pack(DATASETS["a shared beginning"], range(4), shared=6)

    def losses(*adapters: TrainedAdapter | None) -> list[torch.Tensor]:
        batch = load_pass(decoder, [Part(packed, each) for each in adapters], adapter.tables)
        found = finish(forward(decoder, batch))
        return [found.part(span).loss for span in batch.learned]

    (alone,), (_, beside) = losses(None), losses(adapter, None)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)
    assert dataset.num_trained == len(alone)


@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_adapters_train_beside_virtual_tokens(tiny_base: Path, kind: RowKind) -> None:
    decoder, dataset = load_decoder(tiny_base), DATASETS["no two rows alike"]
    lora = make_adapter(decoder, LoraSpec(rank=4))
    virtual = virtual_adapter(decoder, kind, lora._arena)
    parts = [Part(pack(dataset, [0, 1]), lora), Part(pack(dataset, [2, 3]), virtual)]

    def gradients(passes: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
        lora._arena.tables.grad.zero_()  # type: ignore[union-attr]  # an arena of training has one
        for each in passes:
            train(decoder, load_pass(decoder, each, lora.tables), 1.0)
        return [lora.grad.clone(), virtual.grad.clone()]

    for alone, beside in zip(gradients([parts[:1], parts[1:]]), gradients([parts]), strict=True):
        assert alone.any()
        torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


def test_rows_behind_learned_keys_share_no_pass_with_others(tiny_base: Path) -> None:
    decoder = load_decoder(tiny_base)
    lora = make_adapter(decoder, LoraSpec(rank=4))
    prefix, prompt = (virtual_adapter(decoder, kind, lora._arena) for kind in CONFIGS)
    parts = [pack(DATASETS["no two rows alike"], [0])]
    kinds = [Work("run", "group", parts, adapter).kind for adapter in (lora, prompt, prefix)]
    assert kinds[0] == kinds[1] != kinds[2]
