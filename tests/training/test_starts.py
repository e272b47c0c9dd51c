"""Where an adapter begins and how its halves learn: PEFT's EVA and LoRA+ are the oracles."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.eva import initialize_lora_eva_weights

from tenora.adapters.peft_format import read_adapter
from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.model.spec import table_rows, target_modules
from tenora.training import eva
from tenora.training.arena import TrainingArena
from tenora.training.checkpoint import checkpoint_path
from tenora.training.commands import AdamWSettings
from tenora.training.eva import begin_by_variance, redistributed
from tenora.training.events import FinishedEvent, TrainEvent
from tenora.training.kinds.kind import low_rank_scaling
from tenora.training.optimizer import AdamW
from tenora.training.packing import PackedRows, microbatches
from tenora.training.spec import LoraSpec
from tests.training.runs import MakeSpec, TrainingRun
from tests.training.test_step import finish, make_adapter, peft_model

CPU = torch.device("cpu")
# peft reads a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Generator[None, None, None]:
    """As `TrainingRun` calls these functions."""
    with torch.no_grad():
        yield


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_of_lora_plus_equals_pefts(tiny_base: Path, decoder: Decoder, weight_decay: float) -> None:
    lora = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"), lora_plus_ratio=16.0)
    adapter = make_adapter(decoder, lora)
    model = peft_model(tiny_base, lora, adapter)
    decay = {"loraplus_weight_decay": weight_decay} if weight_decay else {}
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, **decay, weight_decay=weight_decay
    )
    ours = AdamW(adapter, adapter.rates)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        adapter.grad.copy_(torch.randn(adapter.grad.shape, generator=generator))
        before = adapter.weights.clone()
        adapter.weights.copy_(adapter.grad)
        gradients = adapter.export()  # the gradient by module, cut as the weights are
        adapter.weights.copy_(before)
        for path, (a, b) in gradients.items():
            module = model.get_submodule(f"base_model.model.{path}")
            module.lora_A["default"].weight.grad = torch.from_numpy(a)
            module.lora_B["default"].weight.grad = torch.from_numpy(b)
        theirs.step()
        ours.step(AdamWSettings(learning_rate=1e-3, weight_decay=weight_decay))
    for path, (a, b) in adapter.export().items():
        module = model.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(torch.from_numpy(a), module.lora_A["default"].weight.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(b), module.lora_B["default"].weight.detach(), rtol=0, atol=1e-6)


def long_rows(count: int, length: int) -> TokenizedDataset:
    """Rows of which every token but the first is learned."""
    random = np.random.default_rng(1)
    weights = np.ones(count * length, dtype=np.uint8)
    weights[::length] = 0
    return TokenizedDataset(
        tokens=random.integers(3, 384, count * length).astype(np.int32),
        weights=weights,
        offsets=np.arange(count + 1) * length,
        lines=np.arange(1, count + 1),
    )


def of_peft(base: Path, lora: LoraSpec, rows: TokenizedDataset) -> Any:
    """The base with an adapter that PEFT has begun by EVA on these rows, a row a batch, of which it takes two."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=lora.eva_rho),
        task_type="CAUSAL_LM",
    )
    config.eva_config.tau = -1.0
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    batches = []
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.row(row)[0].astype(np.int64))[None]
        labels = ids.clone()
        labels[:, -1] = -100  # PEFT looks at the places of labels, we at those that something is predicted from
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    return adapted


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_begins_where_peft_begins(
    tiny_base: Path, decoder: Decoder, rho: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After as many rows: PEFT waits for directions that change their sign, too, and so ends elsewhere."""
    monkeypatch.setattr(eva, "CONVERGED", -1.0)
    lora = LoraSpec(
        rank=6, alpha=12.0, init="eva", eva_rho=rho, target_modules=("q_proj", "o_proj", "up_proj", "down_proj")
    )
    rows = long_rows(4, 200)
    adapter = TrainingArena(table_rows(decoder.spec), device=CPU).add(lora)

    def parts() -> Iterator[PackedRows]:
        while True:
            for row in range(len(rows)):
                yield from microbatches(rows, [row], 1)

    ranks, directions = finish(begin_by_variance(decoder, adapter, parts()))
    assert sum(ranks) == sum(adapter.ranks)
    assert (len(set(ranks) - {0}) > 1) == (rho > 1), "the ranks were to be moved"
    model = of_peft(tiny_base, lora, rows)
    for module in target_modules(decoder.spec):
        if not ranks[module.row]:
            continue
        theirs = model.get_submodule(f"base_model.model.{module.path}")
        expected = theirs.lora_A["default"].weight
        assert expected.shape[0] == ranks[module.row]
        cosines = (directions[module.row].float() * expected).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)
        assert theirs.scaling["default"] == pytest.approx(low_rank_scaling(lora))
        assert not theirs.lora_B["default"].weight.any()


def test_ranks_go_where_more_is_explained_and_each_module_keeps_one() -> None:
    ratios = {0: torch.tensor([0.9, 0.05, 0.01]), 3: torch.tensor([0.3, 0.2, 0.15]), 5: torch.tensor([1e-6, 1e-7, 0])}
    assert redistributed(ratios, 6) == {0: 2, 3: 3, 5: 1}
    assert redistributed(ratios, 3) == {0: 1, 3: 1, 5: 1}
    assert redistributed(ratios, 100) == {0: 3, 3: 3, 5: 3}


def test_a_run_begins_by_eva_and_peft_loads_what_it_exports(
    decoder: Decoder, make_spec: MakeSpec, tiny_base: Path
) -> None:
    spec = make_spec(lora=LoraSpec(rank=4, alpha=8.0, init="eva"), max_steps=3, eval_interval=3)
    events: list[TrainEvent | None] = list(TrainingRun(decoder, spec))
    assert isinstance(events[-1], FinishedEvent)
    directory = checkpoint_path(Path(spec.workdir), 3)
    found = read_adapter(directory, table_rows(decoder.spec), max_rank=8)
    assert len({module.rank for module in found.modules.values()}) > 1
    assert {round(module.scaling, 6) for module in found.modules.values()} == {2.0}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, directory)
    for path, module in found.modules.items():
        layer = loaded.get_submodule(f"base_model.model.{path}")
        assert layer.scaling["default"] == pytest.approx(2.0)
        torch.testing.assert_close(layer.lora_B["default"].weight.detach(), torch.from_numpy(module.b.copy()))


def test_a_run_that_began_by_eva_goes_on_from_its_state(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as an uninterrupted one, and the rows are not looked at again."""
    changes = {"lora": LoraSpec(rank=3, alpha=6.0, init="eva"), "max_steps": 4, "eval_interval": 2}
    whole = make_spec(**changes)
    list(TrainingRun(decoder, whole))
    cut = make_spec(**changes)
    run = TrainingRun(decoder, cut)
    for event in run:
        if getattr(event, "step", 0) == 2 and type(event).__name__ == "CheckpointEvent":
            run.stop(pause=True)
    ranks = json.loads((Path(cut.workdir) / "ranks.json").read_text())
    assert len(set(ranks) - {0}) > 1
    monkeypatch.setattr(eva, "redistributed", None)
    list(TrainingRun(decoder, cut))
    for spec in (whole, cut):
        assert checkpoint_path(Path(spec.workdir), 4).is_dir()
    weights = [(checkpoint_path(Path(s.workdir), 4) / "adapter_model.safetensors").read_bytes() for s in (whole, cut)]
    assert weights[0] == weights[1]
