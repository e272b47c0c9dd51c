"""The layer-by-layer step against PEFT and transformers: one row at a time, autograd over the whole model."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import target_modules
from tenora.training.dataset import TokenizedDataset
from tenora.training.evaluation import evaluate
from tenora.training.packing import microbatches, pack
from tenora.training.slots import TrainingSlots
from tenora.training.spec import LoraSpec
from tenora.training.step import Dropout, LoraDropout, forward, forward_backward, load_microbatch

from .rows import random_rows

T = TypeVar("T")
CPU = torch.device("cpu")
# peft reads a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Generator[None, None, None]:
    """As `TrainingRun` calls these functions."""
    with torch.no_grad():
        yield


def finish(items: Generator[None, None, T]) -> T:
    """Run a generator to its result."""
    while True:
        try:
            next(items)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # StopIteration.value is untyped


def make_slots(decoder: Decoder, lora: LoraSpec, seed: int = 0) -> TrainingSlots:
    """A slot with B that is not zero, so that every gradient is alive."""
    slots = TrainingSlots(target_modules(decoder.spec), [lora], device=CPU)
    slots.initialise(0, seed)
    noise = torch.randn(slots.weights(0).shape, generator=torch.Generator().manual_seed(seed))
    slots.weights(0).add_(noise, alpha=0.03)
    return slots


def peft_model(directory: Path, lora: LoraSpec, slots: TrainingSlots) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    for path, (a, b) in slots.export(0).items():
        module = model.get_submodule(f"base_model.model.{path}")
        module.lora_A["default"].weight.copy_(torch.from_numpy(a))
        module.lora_B["default"].weight.copy_(torch.from_numpy(b))
    return model.eval()


def peft_losses(model: Any, dataset: TokenizedDataset) -> list[torch.Tensor]:
    """Per row, the losses of its learned tokens."""
    found = []
    for row in range(len(dataset)):
        tokens, weights = dataset.row(row)
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(weights[1:].astype(bool))])
    return found


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "lora",
    [LoraSpec(rank=4, alpha=8.0), LoraSpec(rank=3, alpha=8.0, target_modules=("q_proj", "down_proj"), use_rslora=True)],
    ids=["all-linear", "two-modules-rslora"],
)
def test_loss_and_gradients_equal_peft(make_tiny: Any, family: str, lora: LoraSpec) -> None:
    directory = make_tiny(family)
    decoder = load_decoder(directory, device=CPU, dtype=torch.float32)
    dataset, slots = random_rows(5, seed=2), make_slots(decoder, lora)
    model = peft_model(directory, lora, slots)
    with torch.enable_grad():
        losses = peft_losses(model, dataset)
        (torch.cat(losses).sum() / dataset.num_trained).backward()
    ours: dict[int, torch.Tensor] = {}
    for packed in microbatches(dataset, range(5), capacity=40):  # several microbatches, several rows in most
        batch = load_microbatch(decoder, packed, slots.tables)
        found = finish(forward_backward(decoder, batch, scale=1 / dataset.num_trained, keep_graphs=True))
        for index, row in enumerate(packed.rows):
            ours[row] = found.loss[torch.from_numpy(packed.target_row == index)]
    for row, loss in enumerate(losses):
        torch.testing.assert_close(ours[row], loss.detach(), rtol=1e-4, atol=1e-5)
    for target in target_modules(decoder.spec):
        if target.name in lora.target_modules:
            module = model.get_submodule(f"base_model.model.{target.path}")
            grad_a, grad_b = slots.tables.grad_a(target.row, 0), slots.tables.grad_bt(target.row, 0).t()
            for grad, reference in (
                (grad_a, module.lora_A["default"].weight.grad),
                (grad_b, module.lora_B["default"].weight.grad),
            ):
                torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()) + 1e-7)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_rows_do_not_see_each_other(decoder: Decoder) -> None:
    slots = make_slots(decoder, LoraSpec(rank=4))
    dataset = random_rows(4, seed=5)
    changed = random_rows(4, seed=5)
    for row in (0, 2):  # same lengths, so that sums run in the same order and bits can be compared
        changed.row(row)[0][:] = (changed.row(row)[0] + 7) % 300
    losses = []
    for rows in (dataset, changed):
        packed = pack(rows, [0, 1, 2, 3])
        losses.append(finish(forward(decoder, load_microbatch(decoder, packed, slots.tables))).loss)
    kept = torch.from_numpy(np.isin(packed.target_row, [1, 3]))
    assert torch.equal(losses[0][kept], losses[1][kept])
    assert not torch.equal(losses[0][~kept], losses[1][~kept])
    alone = finish(forward(decoder, load_microbatch(decoder, pack(dataset, [3]), slots.tables))).loss
    torch.testing.assert_close(losses[0][torch.from_numpy(packed.target_row == 3)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_running_layers_twice_to_save_memory_gives_the_same_bits(decoder: Decoder, dropout: float) -> None:
    slots, packed = make_slots(decoder, LoraSpec(rank=4)), pack(random_rows(3, seed=1), [0, 1, 2])
    source = Dropout(LoraDropout(dropout, CPU), seed=1, step=4, microbatch=0) if dropout else None
    results = []
    for keep_graphs in (True, False):
        slots.grad(0).zero_()
        batch = load_microbatch(decoder, packed, slots.tables, dropout=source)
        found = finish(forward_backward(decoder, batch, scale=0.1, keep_graphs=keep_graphs, dropout=source))
        results.append((found.loss, slots.grad(0).clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].any()


def test_dropout_keeps_the_mean_and_its_numbers_depend_on_the_position_only() -> None:
    dropout, x = LoraDropout(0.25, CPU), torch.ones(200, 100)
    dropout.seek(3, 1, 0, 2)
    first = dropout(x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(first.mean()) == pytest.approx(1.0, abs=0.02)
    dropout.seek(3, 1, 0, 3)
    assert not torch.equal(dropout(x), first)
    dropout.seek(3, 1, 0, 2)
    assert torch.equal(dropout(x), first)


def test_logits_in_chunks_equal_logits_at_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(random_rows(8, seed=3), list(range(8)))
    assert len(packed.targets) > 40
    results = []
    for budget in (1, 2**30):  # at least 16 tokens a chunk, or all of them
        monkeypatch.setattr("tenora.training.step._LOGITS_BYTES", {"cpu": budget})
        slots = make_slots(decoder, LoraSpec(rank=4))
        batch = load_microbatch(decoder, packed, slots.tables)
        found = finish(forward_backward(decoder, batch, scale=0.1, keep_graphs=True))
        results.append((found.loss, found.correct, slots.grad(0)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])


def test_the_step_can_be_left_between_layers_in_both_directions(decoder: Decoder) -> None:
    slots, packed = make_slots(decoder, LoraSpec(rank=4)), pack(random_rows(3, seed=1), [0, 1, 2])
    items = forward_backward(decoder, load_microbatch(decoder, packed, slots.tables), scale=0.1, keep_graphs=True)
    boundaries = 0
    for _ in items:
        boundaries += 1
        assert not torch.is_grad_enabled()
    assert boundaries >= 2 * len(decoder.layers) + 1


def test_evaluation_is_the_mean_over_tokens_whatever_the_capacity(decoder: Decoder, tiny_base: Path) -> None:
    dataset = random_rows(6, seed=9)
    slots = make_slots(decoder, LoraSpec(rank=4))
    model = peft_model(tiny_base, LoraSpec(rank=4), slots)
    expected = float(torch.cat(peft_losses(model, dataset)).mean())
    for capacity in (1, 30, 1000):
        found = finish(evaluate(decoder, dataset, slots.tables, capacity=capacity))
        assert found.loss == pytest.approx(expected, rel=1e-5)
    with model.disable_adapter():
        base = float(torch.cat(peft_losses(model, dataset)).mean())
    assert finish(evaluate(decoder, dataset, None, capacity=50)).loss == pytest.approx(base, rel=1e-5)
    assert base != pytest.approx(expected, rel=1e-3)


def test_slots_lie_side_by_side_and_begin_as_the_base(decoder: Decoder) -> None:
    targets = target_modules(decoder.spec)
    slots = TrainingSlots(targets, [LoraSpec(rank=2), LoraSpec(rank=5, target_modules=("o_proj",))], device=CPU)
    state = torch.random.get_rng_state()
    slots.initialise(1, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not slots.weights(0).any()
    assert slots.weights(0).numel() + slots.weights(1).numel() == slots.tables.arena.numel()
    exported = slots.export(1)
    assert set(exported) == {target.path for target in targets if target.name == "o_proj"}
    a, b = exported["model.layers.0.self_attn.o_proj"]
    assert a.shape == (5, decoder.spec.q_size)
    assert b.shape == (decoder.spec.hidden_size, 5)
    assert 0.5 / decoder.spec.q_size**0.5 < np.abs(a).max() <= 1 / decoder.spec.q_size**0.5
    assert not b.any()


@pytest.mark.parametrize(
    "lora", [LoraSpec(target_modules=("q_proj", "lm_head")), LoraSpec(target_modules=()), LoraSpec(rank=0)]
)
def test_adapters_that_cannot_be_are_refused(decoder: Decoder, lora: LoraSpec) -> None:
    with pytest.raises(TrainingError):
        TrainingSlots(target_modules(decoder.spec), [lora], device=CPU)
