"""The first step of every kind of adapters, loss and gradient, against PEFT, or autograd through transformers."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from tenora.adapters.peft_format import read_adapter, write_files
from tenora.adapters.table_rows import RowKind
from tenora.data.dataset import TokenizedDataset
from tenora.model.decoder import Decoder
from tenora.model.executors.layers import Keep
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora.training.arena import Base, TrainedAdapter, TrainingArena
from tenora.training.events import FinishedEvent, StepEvent
from tenora.training.kinds.table import KINDS
from tenora.training.packing import microbatches
from tenora.training.spec import LoraSpec
from tenora.training.step import Part, forward_backward, load_pass
from tests.data.rows import random_rows
from tests.support.full import full_but
from tests.training.runs import MakeSpec, TrainingRun, assert_same_bits, weights_of

T = TypeVar("T")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


def shape(kind: str, **own: Any) -> LoraSpec:
    return LoraSpec(rank=4, alpha=8.0, type=kind, own=KINDS[kind].own_settings(own))


def make_adapter(decoder: Decoder, lora: LoraSpec, seed: int = 0) -> TrainedAdapter:
    """Somewhere on its way, so that every gradient is alive."""
    arena = TrainingArena(table_rows(decoder.spec), device=CPU, base=Base(decoder))
    adapter = arena.add(lora)
    adapter.initialise(seed)
    adapter.weights.add_(torch.randn(adapter.weights.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.03)
    adapter.refresh()
    return adapter


def finish(items: Generator[None, None, T]) -> T:
    while True:
        try:
            next(items)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # T


def one_step(decoder: Decoder, adapter: TrainedAdapter, dataset: TokenizedDataset) -> dict[int, Tensor]:
    """Losses by row; the gradient of their mean is the adapter's then."""
    ours: dict[int, Tensor] = {}
    for packed in microbatches(dataset, range(len(dataset)), capacity=40):
        batch = load_pass(decoder, [Part(packed, adapter)], adapter.tables)
        weights = torch.full((len(batch.targets),), 1 / dataset.num_trained)
        found = finish(forward_backward(decoder, batch, weights, keep=Keep.ALL))
        for index, row in enumerate(packed.rows):
            ours[row] = found.loss[torch.from_numpy(packed.target_row == index)]
    adapter.kind.gradients(adapter)
    return ours


def their_losses(model: Any, dataset: TokenizedDataset) -> list[Tensor]:
    found = []
    for row in range(len(dataset)):
        tokens, weights = dataset.row(row)
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(weights[1:].astype(bool))])
    return found


def transformers_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    bound = 1e-3 * float(theirs.abs().max()) + 1e-7
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=bound)
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_the_first_step_is_that_of_peft(make_tiny: Any, tmp_path: Path, family: str, kind: str) -> None:
    directory = make_tiny(family)
    decoder = load_decoder(directory, device=CPU, dtype=torch.float32)
    adapter, dataset = make_adapter(decoder, shape(kind)), random_rows(5, seed=2)
    write_files(tmp_path / "adapter", *adapter.files("tiny"))
    model = peft.PeftModel.from_pretrained(transformers_model(directory), tmp_path / "adapter", is_trainable=True)
    with torch.enable_grad():
        theirs = their_losses(model, dataset)
        (torch.cat(theirs).sum() / dataset.num_trained).backward()
    ours = one_step(decoder, adapter, dataset)
    for row, loss in enumerate(theirs):
        torch.testing.assert_close(ours[row], loss.detach(), rtol=1e-5, atol=1e-5)
    rows = adapter.rows
    learned = {RowKind.LOW_RANK, RowKind.MAGNITUDE} if kind == "dora" else {RowKind.SCALE}
    for number, row in enumerate(rows.rows):
        if row.kind not in learned or not adapter.ranks[number]:
            continue
        ours_here = adapter.grad_a(number)
        if row.kind == RowKind.SCALE and row.path.endswith("up_proj"):
            theirs_here = model.get_parameter(f"base_model.model.{row.path.replace('up_', 'down_')}.ia3_l.default").grad
        elif row.kind == RowKind.SCALE:
            theirs_here = model.get_parameter(f"base_model.model.{row.path}.ia3_l.default").grad
        elif row.kind == RowKind.MAGNITUDE:
            name = f"base_model.model.{row.path}.lora_magnitude_vector.default.weight"
            theirs_here = model.get_parameter(name).grad
        else:
            theirs_here = model.get_parameter(f"base_model.model.{row.path}.lora_A.default.weight").grad
            b = model.get_parameter(f"base_model.model.{row.path}.lora_B.default.weight").grad
            assert_close(adapter.tables.grad_bt(number, adapter.slot).t(), b)
        assert_close(ours_here, theirs_here.reshape(ours_here.shape))


@contextmanager
def with_bottlenecks(model: Any, adapter: TrainedAdapter) -> Iterator[dict[int, Tensor]]:
    """Their formula as hooks of transformers' blocks; yields leaves by row of the base."""
    rows, leaves, hooks = adapter.rows, {}, []
    function = {"silu": F.silu, "relu": F.relu}[adapter.lora.own["non_linearity"]]
    streams: dict[str, Tensor] = {}
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}

    def leaf(row: int, value: Tensor) -> Tensor:
        leaves[row] = value.detach().clone().requires_grad_()
        return leaves[row]

    for row in adapter.filled(RowKind.BOTTLENECK):
        path = rows.rows[row].path
        layer, _, block = path.rpartition(".")
        down, up = leaf(row, adapter.a(row)), leaf(-row, adapter.bt(row))
        inner = leaf(rows.row(RowKind.INNER_BIAS, path), adapter.a(rows.row(RowKind.INNER_BIAS, path)))
        outer = leaf(rows.row(RowKind.OUTER_BIAS, path), adapter.a(rows.row(RowKind.OUTER_BIAS, path)))

        def note(_module: Any, given: Any, *, path: str = path) -> None:
            streams[path] = given[0]

        def add(
            _module: Any,
            _given: Any,
            output: Any,
            *,
            path: str = path,
            parts: tuple[Tensor, ...] = (down, up, inner, outer),
        ) -> Any:
            own = output[0] if isinstance(output, tuple) else output
            source = streams[path] if adapter.lora.type == "parallel" else own
            if adapter.lora.own.get("placement") == "pfeiffer":
                source = streams[path] + own
            made = function(source @ parts[0].t() + parts[2][:, 0]) @ parts[1] + parts[3][0]
            changed = own + adapter.scaling * made
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        hooks.append(model.get_submodule(f"{layer}.{norms[block]}").register_forward_pre_hook(note))
        hooks.append(model.get_submodule(path).register_forward_hook(add))
    yield leaves
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "lora",
    [shape("bottleneck", reduction_factor=8.0), shape("bottleneck", placement="pfeiffer"), shape("parallel")],
    ids=["houlsby", "pfeiffer", "parallel"],
)
def test_the_first_step_of_bottlenecks_is_that_of_autograd_through_transformers(make_tiny: Any, lora: LoraSpec) -> None:
    directory = make_tiny("smollm2")
    decoder = load_decoder(directory, device=CPU, dtype=torch.float32)
    adapter, dataset, model = make_adapter(decoder, lora), random_rows(5, seed=2), transformers_model(directory)
    with torch.enable_grad(), with_bottlenecks(model, adapter) as leaves:
        theirs = their_losses(model, dataset)
        (torch.cat(theirs).sum() / dataset.num_trained).backward()
    ours = one_step(decoder, adapter, dataset)
    for row, loss in enumerate(theirs):
        torch.testing.assert_close(ours[row], loss.detach(), rtol=1e-5, atol=1e-5)
    for row, value in leaves.items():
        assert value.grad is not None
        found = adapter.grad_a(row) if row >= 0 else adapter.tables.grad_bt(-row, adapter.slot)
        assert_close(found, value.grad)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"lora", "prefix", "prompt"}])
def test_a_kind_begins_as_the_base(decoder: Decoder, kind: str) -> None:
    arena = TrainingArena(table_rows(decoder.spec), device=CPU, base=Base(decoder))
    adapter = arena.add(shape(kind))
    adapter.initialise(3)
    packed = microbatches(random_rows(3, seed=2), range(3), capacity=200)[0]
    batch = load_pass(decoder, [Part(packed, adapter)], adapter.tables)
    plain = load_pass(decoder, [Part(packed)])
    coefficients = torch.full((len(batch.targets),), 0.1)
    ours = finish(forward_backward(decoder, batch, coefficients, keep=Keep.ALL)).loss
    base = finish(forward_backward(decoder, plain, coefficients, keep=Keep.ALL)).loss
    torch.testing.assert_close(ours, base, rtol=1e-5, atol=2e-5)
    assert adapter.grad.any()


def test_steps_leave_what_follows_from_the_weights_true(decoder: Decoder) -> None:
    adapter = make_adapter(decoder, shape("dora"))
    before = adapter.matrices(RowKind.SCALE)
    adapter.weights.add_(0.01)
    adapter.refresh()
    for path, scale in adapter.matrices(RowKind.SCALE).items():
        row = adapter.rows.row(RowKind.LOW_RANK, path)
        weight = adapter.base.row_norms.of(row, adapter.a(row), adapter.bt(row), adapter.scaling)
        magnitude = adapter.a(adapter.rows.row(RowKind.MAGNITUDE, path))[0]
        torch.testing.assert_close(torch.from_numpy(scale[0]), magnitude / weight, rtol=1e-6, atol=0)
        assert not np.array_equal(scale, before[path])


@pytest.mark.parametrize("kind", full_but(["dora", "prefix"], [kind for kind in KINDS if kind != "lora"]))
def test_a_run_of_any_kind_learns_and_resumes_to_the_same_bits(
    decoder: Decoder, make_spec: MakeSpec, kind: str
) -> None:
    lora = shape(kind)
    whole = list(TrainingRun(decoder, make_spec(lora=lora)))
    finished = whole[-1]
    assert isinstance(finished, FinishedEvent)
    losses = [event.train_loss for event in whole if isinstance(event, StepEvent)]
    assert sum(losses[-4:]) < sum(losses[:4])  # four steps are an epoch: the same rows
    spec = make_spec(lora=lora)
    run = TrainingRun(decoder, spec)
    for number, _ in enumerate(run):
        if number == len(whole) // 2:
            run.stop(pause=True)
    resumed = list(TrainingRun(decoder, spec))[-1]
    assert isinstance(resumed, FinishedEvent)
    assert_same_bits(weights_of(finished), weights_of(resumed))
    found = read_adapter(Path(finished.path), table_rows(decoder.spec), max_rank=256)
    assert len(found.modules) + len(found.parts) > 0
