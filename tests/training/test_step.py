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

from tenora.data.dataset import TokenizedDataset
from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.model.executors.layers import Keep
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows, target_modules
from tenora.training.arena import TrainedAdapter, TrainingArena
from tenora.training.evaluation import Evaluation, measure
from tenora.training.packing import PackedRows, microbatches, pack, shared_prefix
from tenora.training.pass_queue import WorkQueue
from tenora.training.spec import LoraSpec, TrainSpec
from tenora.training.step import (
    Dropout,
    LoraDropout,
    Part,
    Pass,
    StreamDropout,
    TokenLosses,
    forward,
    forward_backward,
    load_pass,
)
from tests.data.rows import random_rows

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


def make_adapter(decoder: Decoder, lora: LoraSpec, seed: int = 0, arena: TrainingArena | None = None) -> TrainedAdapter:
    """An adapter with B that is not zero, so that every gradient is alive."""
    arena = arena or TrainingArena(table_rows(decoder.spec), device=CPU)
    adapter = arena.add(lora)
    adapter.initialise(seed)
    noise = torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(seed))
    adapter.weights.add_(noise, alpha=0.03)
    adapter.refresh()
    return adapter


def load(decoder: Decoder, packed: PackedRows, adapter: TrainedAdapter, dropout: Dropout | None = None) -> Pass:
    return load_pass(decoder, [Part(packed, adapter, dropout)], adapter.tables)


def train(decoder: Decoder, batch: Pass, scale: float, *, keep: Keep = Keep.ALL) -> TokenLosses:
    weights = torch.full((len(batch.targets),), scale)
    return finish(forward_backward(decoder, batch, weights, keep=keep))


def peft_model(directory: Path, lora: LoraSpec, adapter: TrainedAdapter, **given: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted({path.rpartition(".")[2] for path in adapter.export()}),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
        **given,
    )
    model = peft.get_peft_model(base, config)
    for path, (a, b) in adapter.export().items():
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
    dataset, adapter = random_rows(5, seed=2), make_adapter(decoder, lora)
    model = peft_model(directory, lora, adapter)
    with torch.enable_grad():
        losses = peft_losses(model, dataset)
        (torch.cat(losses).sum() / dataset.num_trained).backward()
    ours: dict[int, torch.Tensor] = {}
    for packed in microbatches(dataset, range(5), capacity=40):  # several microbatches, several rows in most
        found = train(decoder, load(decoder, packed, adapter), 1 / dataset.num_trained)
        for index, row in enumerate(packed.rows):
            ours[row] = found.loss[torch.from_numpy(packed.target_row == index)]
    for row, loss in enumerate(losses):
        torch.testing.assert_close(ours[row], loss.detach(), rtol=1e-4, atol=1e-5)
    for target in target_modules(decoder.spec):
        if target.name in (lora.target_modules or target.name):
            module = model.get_submodule(f"base_model.model.{target.path}")
            grad_a, grad_b = adapter.tables.grad_a(target.row, 0), adapter.tables.grad_bt(target.row, 0).t()
            for grad, reference in (
                (grad_a, module.lora_A["default"].weight.grad),
                (grad_b, module.lora_B["default"].weight.grad),
            ):
                torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()) + 1e-7)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_rows_do_not_see_each_other(decoder: Decoder) -> None:
    adapter = make_adapter(decoder, LoraSpec(rank=4))
    dataset = random_rows(4, seed=5)
    changed = random_rows(4, seed=5)
    for row in (0, 2):  # same lengths, so that sums run in the same order and bits can be compared
        changed.row(row)[0][:] = (changed.row(row)[0] + 7) % 300
    losses = []
    for rows in (dataset, changed):
        packed = pack(rows, [0, 1, 2, 3])
        losses.append(finish(forward(decoder, load(decoder, packed, adapter))).loss)
    kept = torch.from_numpy(np.isin(packed.target_row, [1, 3]))
    assert torch.equal(losses[0][kept], losses[1][kept])
    assert not torch.equal(losses[0][~kept], losses[1][~kept])
    alone = finish(forward(decoder, load(decoder, pack(dataset, [3]), adapter))).loss
    torch.testing.assert_close(losses[0][torch.from_numpy(packed.target_row == 3)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_running_layers_twice_to_save_memory_gives_the_same_bits(decoder: Decoder, dropout: float) -> None:
    adapter, packed = make_adapter(decoder, LoraSpec(rank=4)), pack(random_rows(3, seed=1), [0, 1, 2])
    source = Dropout(LoraDropout(dropout, CPU), seed=1, step=4, microbatch=0) if dropout else None
    results = []
    for keep in (Keep.ALL, Keep.INPUTS):
        adapter.grad.zero_()
        found = train(decoder, load(decoder, packed, adapter, source), 0.1, keep=keep)
        results.append((found.loss, adapter.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].any()


def test_dropout_keeps_the_mean_and_its_numbers_depend_on_the_position_only() -> None:
    source = LoraDropout(0.25, CPU)
    numbers, x = Dropout(source, seed=3, step=1, microbatch=0), torch.ones(200, 100)
    dropout = StreamDropout([(slice(0, 200), numbers)])
    dropout.seek(2)
    first = dropout(x)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(first.mean()) == pytest.approx(1.0, abs=0.02)
    dropout.seek(3)
    assert not torch.equal(dropout(x), first)
    dropout.seek(2)
    assert torch.equal(dropout(x), first)


def test_logits_in_chunks_equal_logits_at_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(random_rows(8, seed=3), list(range(8)))
    assert len(packed.targets) > 40
    results = []
    for budget in (1, 2**30):  # at least 16 tokens a chunk, or all of them
        monkeypatch.setattr("tenora.model.readouts.tokens._LOGITS_BYTES", {"cpu": budget})
        adapter = make_adapter(decoder, LoraSpec(rank=4))
        found = train(decoder, load(decoder, packed, adapter), 0.1)
        results.append((found.loss, found.correct, adapter.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])


def test_the_step_can_be_left_between_layers_in_both_directions(decoder: Decoder) -> None:
    adapter, packed = make_adapter(decoder, LoraSpec(rank=4)), pack(random_rows(3, seed=1), [0, 1, 2])
    batch = load(decoder, packed, adapter)
    items = forward_backward(decoder, batch, torch.full((len(batch.targets),), 0.1), keep=Keep.ALL)
    boundaries = 0
    for _ in items:
        boundaries += 1
        assert not torch.is_grad_enabled()
    assert boundaries >= 2 * len(decoder.layers) + 1


def evaluate(decoder: Decoder, dataset: TokenizedDataset, adapter: TrainedAdapter | None, capacity: int) -> Evaluation:
    """As a run measures, pass by pass."""
    spec = TrainSpec(run_id="r", share_group="g", tasks=(), workdir="", base_model="")
    queue = WorkQueue()
    waiting = measure(queue, spec, dataset, adapter, capacity=capacity)
    while True:
        try:
            next(waiting)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # StopIteration.value is untyped
        (work,) = queue.choose(capacity)
        batch = load_pass(decoder, [work.part(len(work.results))], None if adapter is None else adapter.tables)
        queue.finished(work, finish(forward(decoder, batch)))


def test_evaluation_is_the_mean_over_tokens_whatever_the_capacity(decoder: Decoder, tiny_base: Path) -> None:
    dataset = random_rows(6, seed=9)
    adapter = make_adapter(decoder, LoraSpec(rank=4))
    model = peft_model(tiny_base, LoraSpec(rank=4), adapter)
    expected = float(torch.cat(peft_losses(model, dataset)).mean())
    for capacity in (1, 30, 1000):
        found = evaluate(decoder, dataset, adapter, capacity)
        assert found.loss == pytest.approx(expected, rel=1e-5)
    with model.disable_adapter():
        base = float(torch.cat(peft_losses(model, dataset)).mean())
    assert evaluate(decoder, dataset, None, 50).loss == pytest.approx(base, rel=1e-5)
    assert base != pytest.approx(expected, rel=1e-3)


def test_adapters_lie_side_by_side_and_begin_as_the_base(decoder: Decoder) -> None:
    targets = target_modules(decoder.spec)
    arena = TrainingArena(table_rows(decoder.spec), device=CPU)
    small = arena.add(LoraSpec(rank=2))
    small.weights.fill_(3.0)
    state = torch.random.get_rng_state()
    adapter = arena.add(LoraSpec(rank=5, target_modules=("o_proj",)))
    adapter.initialise(seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bool((small.weights == 3.0).all())
    assert small.weights.numel() + adapter.weights.numel() == arena.tables.arena.numel()
    exported = adapter.export()
    assert set(exported) == {target.path for target in targets if target.name == "o_proj"}
    a, b = exported["model.layers.0.self_attn.o_proj"]
    assert a.shape == (5, decoder.spec.q_size)
    assert b.shape == (decoder.spec.hidden_size, 5)
    assert 0.5 / decoder.spec.q_size**0.5 < np.abs(a).max() <= 1 / decoder.spec.q_size**0.5
    assert not b.any()
    before = adapter.weights.clone()
    small.remove()
    assert torch.equal(adapter.weights, before)
    assert adapter.weights.numel() == arena.tables.arena.numel()


@pytest.mark.parametrize("lora", [LoraSpec(target_modules=("q_proj", "lm_head")), LoraSpec(rank=0)])
def test_adapters_that_cannot_be_are_refused(decoder: Decoder, lora: LoraSpec) -> None:
    with pytest.raises(TrainingError):
        TrainingArena(table_rows(decoder.spec), device=CPU).add(lora)


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen3"])
def test_a_shared_prefix_changes_neither_losses_nor_gradients(make_tiny: Any, family: str) -> None:
    decoder = load_decoder(make_tiny(family), device=CPU, dtype=torch.float32)
    rows = random_rows(4, seed=8)
    lengths = np.diff(rows.offsets) + 6
    prefix = np.arange(20, 26, dtype=np.int32)
    dataset = TokenizedDataset(
        tokens=np.concatenate([np.concatenate([prefix, rows.row(row)[0]]) for row in range(4)]),
        weights=np.concatenate([np.concatenate([np.zeros(6, np.uint8), rows.row(row)[1]]) for row in range(4)]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        lines=rows.lines,
    )
    assert shared_prefix(dataset) == 6
    found = []
    for shared in (0, 6):
        adapter = make_adapter(decoder, LoraSpec(rank=4))
        packed = pack(dataset, [0, 1, 2, 3], shared=shared)
        losses = train(decoder, load(decoder, packed, adapter), 0.1)
        found.append((packed.tokens, losses.loss, adapter.grad))
    assert found[0][0] - found[1][0] == 3 * 6
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-4, atol=1e-5)
