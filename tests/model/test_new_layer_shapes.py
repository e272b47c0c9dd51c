"""A family of another layer is a layout: an MLP without a gate (Arcee), and q, k, v as one module (Phi-3).

Neither is served. Here they become families as any would, with transformers and peft as oracles of all that follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from tenora.data.dataset import TokenizedDataset
from tenora.model import decoder as decoders
from tenora.model import spec as specs
from tenora.model.context import ForwardContext
from tenora.model.decoder import Make
from tenora.model.layout import LAYOUTS, Block, Layout, Module, Site, Sizes, gated_decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import ModelSpec, target_modules
from tenora.training.events import FinishedEvent, StepEvent
from tenora.training.spec import LoraSpec
from tenora_kernels.cpu.runtime.team import Team
from tests.engine.driver import Driver, greedy, load_peft, ref_of
from tests.engine.requests import generate, prompt, sampling
from tests.support import tiny
from tests.support.full import full_but
from tests.training.runs import TrainingRun, default_spec, events_of, write_rows

NEW: dict[str, dict[str, Any]] = {
    "arcee": {"model_type": "arcee", "hidden_act": "silu", "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, "original_max_position_embeddings": 512},
}
MODULES = {
    "arcee": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def ungated_decoder(sizes: Sizes) -> Layout:
    """Attention as everywhere, and down(act(up(x)))."""
    attention, _ = gated_decoder(sizes).blocks
    up = Site("up", sizes.hidden, (Module("up_proj", sizes.mlp),), bias=sizes.mlp_bias)
    down = Site("down", sizes.mlp, (Module("down_proj", sizes.hidden),), bias=sizes.mlp_bias)
    return Layout((attention, Block("mlp", "ungated_mlp", "post_attention_layernorm", (up, down))))


def fused_decoder(sizes: Sizes) -> Layout:
    """q, k and v are one module of the checkpoint, and so are gate and up."""
    attention, gated = gated_decoder(sizes).blocks
    (qkv, o), (gate_up, down) = attention.sites, gated.sites
    return Layout(
        (
            Block(
                attention.name,
                attention.kind,
                attention.norm,
                (Site("qkv", qkv.input, (Module("qkv_proj", qkv.output),)), o),
            ),
            Block(
                gated.name,
                gated.kind,
                gated.norm,
                (Site("gate_up", gate_up.input, (Module("gate_up_proj", gate_up.output),)), down),
            ),
        )
    )


class UngatedMLP(nn.Module):
    """What `ungated_decoder` computes beside attention."""

    def __init__(self, make: Make, layer: int, block: Block) -> None:
        super().__init__()
        sites = make.projections(layer, block)
        self.up, self.down = sites["up"], sites["down"]
        self.activation = decoders.ACTIVATIONS[make.spec.hidden_act]

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        mapped: Tensor = self.down(self.activation(self.up(hidden, context)), context)
        return mapped


@pytest.fixture(params=sorted(NEW))
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model of a family that is made known for the time of the test."""
    family: str = request.param
    layout = {"arcee": ungated_decoder, "phi3": fused_decoder}[family]
    monkeypatch.setitem(specs.FAMILIES, family, family)
    monkeypatch.setitem(specs._DEFAULTS, family, {"sliding_window": None})
    monkeypatch.setitem(LAYOUTS, family, layout)
    monkeypatch.setitem(decoders.BLOCKS, "ungated_mlp", UngatedMLP)
    monkeypatch.setitem(tiny.FAMILIES, family, NEW[family])
    return tiny.build_tiny(tmp_path / family, family)


def family_of(base: Path) -> str:
    return ModelSpec.from_directory(base).family


def test_target_modules_are_the_linear_layers_of_transformers(base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }
    targets = target_modules(ModelSpec.from_directory(base))
    assert {target.path: (target.in_features, target.out_features) for target in targets} == linears
    assert [target.row for target in targets] == list(range(len(targets)))
    assert list(dict.fromkeys(target.name for target in targets)) == MODULES[family_of(base)]


@pytest.mark.parametrize("team", full_but(2, [None, 2]), ids=["modules", "team"])
def test_it_trains_an_adapter_that_peft_reads_and_serves_it(base: Path, team: int | None, tmp_path: Path) -> None:
    """A run from file to adapter, peft's losses under it, and peft's tokens from the engine that serves it."""
    decoder = load_decoder(base, team=None if team is None else Team(team))
    work = tmp_path / "run"
    work.mkdir()
    write_rows(work)
    spec = default_spec(work, "work", lora=LoraSpec(rank=4, alpha=8.0), learning_rate=2e-2)
    events = events_of(TrainingRun(decoder, spec))
    finished = events[-1]
    assert isinstance(finished, FinishedEvent), finished
    steps = [event.train_loss for event in events if isinstance(event, StepEvent)]
    assert steps[-1] < steps[0]
    assert finished.held_out is not None

    adapter = ref_of(Path(finished.path))
    weights = load_file(Path(finished.path) / "adapter_model.safetensors")
    assert len(weights) == 2 * len(MODULES[family_of(base)]) * decoder.spec.num_layers
    assert all(bool(value.any()) for value in weights.values())

    model = load_peft(base, adapter)
    for number, (of_row, theirs) in enumerate(zip(finished.held_out.adapter, losses(model, work), strict=True)):
        assert of_row == pytest.approx(theirs, rel=1e-4), number

    driver = Driver(decoder)
    try:
        ids = prompt(9, seed=3)
        (answer,) = driver.run(generate(ids, sampling(6), adapter=adapter))
        assert answer.failure is None
        assert answer.tokens == greedy(model, ids, 6)[0]
    finally:
        driver.close()


def losses(model: Any, work: Path) -> list[float]:
    """Of each held-out row, summed over its learned tokens."""
    rows, found = TokenizedDataset.load(work / "valid.npz"), []
    for row in range(len(rows)):
        tokens, marks = rows.row(row)
        ids = torch.from_numpy(tokens.astype("int64"))
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0, :-1]
        each = nn.functional.cross_entropy(scores, ids[1:], reduction="none")
        found.append(float(each[torch.from_numpy(marks[1:].astype(bool))].sum()))
    return found


def test_the_compiled_layers_run_what_they_compute_whatever_the_modules(base: Path) -> None:
    """They know no MLP without a gate, which runs module by module; that modules are fused is nothing to them."""
    assert (load_decoder(base, team=Team(1)).stack is None) == (family_of(base) == "arcee")
