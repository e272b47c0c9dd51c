"""Readouts under whole training passes: heads against PEFT, transformers and autograd in float64."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from tenora.data.dataset import TokenizedDataset
from tenora.model.executors.choice import layer_pass
from tenora.model.executors.layers import Keep
from tenora.model.loading import load_decoder
from tenora.model.readouts.base import ReadoutKind, ReadPositions
from tenora.model.readouts.heads import HeadReadout, Heads
from tenora.model.readouts.losses import (
    ClassLoss,
    ContrastiveLoss,
    HeadLoss,
    LabelsLoss,
    NegatedScore,
    SquaredError,
)
from tenora.model.readouts.tokens import TOKENS
from tenora.training.arena import TrainedAdapter
from tenora.training.commands import Refused, RunCommand
from tenora.training.fusion import FusedTraining, Run
from tenora.training.methods.answers import MeanLoss
from tenora.training.methods.dpo import PreferenceLoss
from tenora.training.packing import PackedRows, pack
from tenora.training.pass_queue import Work
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import LoraSpec, SessionSpec, TrainSpec
from tenora.training.step import Coefficients, Part, Pass, TokenLosses, forward, forward_backward, load_pass
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraTables

from .test_step import CPU, finish, load, make_adapter, peft_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LORA = LoraSpec(rank=4, alpha=8.0)


@pytest.fixture(autouse=True)
def _no_grad() -> Generator[None, None, None]:
    with torch.no_grad():
        yield


def rows(count: int, *, rows_per_example: int = 1) -> TokenizedDataset:
    """Rows of 6 tokens each, read at the last one but one."""
    rng = np.random.default_rng(5)
    return TokenizedDataset(
        tokens=rng.integers(3, 300, 6 * count).astype(np.int32),
        weights=np.tile(np.array([0, 0, 0, 0, 0, 1], np.uint8), count),
        offsets=np.arange(0, 6 * count + 1, 6),
        lines=np.arange(count),
        rows_per_example=rows_per_example,
    )


def heads(hidden_size: int, labels: Sequence[int]) -> LoraTables:
    """A head for each slot, with so many labels."""
    size = hidden_size * sum(labels)
    generator = torch.Generator().manual_seed(3)
    tables = LoraTables.empty(
        torch.randn(size, generator=generator) * 0.3,
        in_features=[hidden_size],
        out_features=[0],
        slots=len(labels),
        grad=torch.zeros(size),
    )
    start = 0
    for slot, count in enumerate(labels):
        start += tables.place(slot, start, [count], [1.0])
    return tables


def read_ids(dataset: TokenizedDataset) -> torch.Tensor:
    """What is read of the rows, [rows, 5]."""
    return torch.from_numpy(dataset.tokens.astype(np.int64)).view(-1, 6)[:, :5]


def theirs(directory: Path, adapter: TrainedAdapter, dataset: TokenizedDataset) -> tuple[Any, torch.Tensor]:
    """PEFT's model in float64 and its finished hidden states [rows, 5, H]."""
    model = peft_model(directory, LORA, adapter).double()
    with torch.enable_grad():
        return model, model(input_ids=read_ids(dataset), output_hidden_states=True).hidden_states[-1]


def assert_gradients(model: Any, adapter: TrainedAdapter, rtol: float = 1e-3) -> None:
    for target in adapter._modules():
        layer = model.get_submodule(f"base_model.model.{target.path}")
        own = (adapter.tables.grad_a(target.row, 0), adapter.tables.grad_bt(target.row, 0).t())
        for found, part in zip(own, (layer.lora_A, layer.lora_B), strict=True):
            wanted = part["default"].weight.grad.float()
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()) + 1e-7)


def run(
    batch: Pass,
    kind: Heads,
    where: tuple[LoraTables, Sequence[int]],
    targets: torch.Tensor,
    objective: torch.Tensor | Coefficients,
) -> TokenLosses:
    """A pass that is read by heads in tables of their own, by the slots of the rows."""
    tables, slots = where
    if not isinstance(batch.readout, HeadReadout):
        raise TypeError("the pass is of tokens")
    batch.readout = HeadReadout(
        batch.readout.decoder, kind, ReadPositions(np.array(slots), batch.readout.where.starts, tables)
    )
    batch.targets = targets
    return finish(forward_backward(batch.readout.decoder, batch, objective, keep=Keep.ALL))


def head_pass(decoder: Any, packed: PackedRows, adapter: TrainedAdapter) -> Pass:
    return load_pass(decoder, [Part(packed, adapter)], adapter.tables, Heads(0, ClassLoss()))


TASKS: dict[str, tuple[HeadLoss, int, torch.Tensor]] = {
    "single_label_classification": (ClassLoss(), 4, torch.tensor([[3.0], [0], [2], [1], [1]])),
    "multi_label_classification": (
        LabelsLoss(),
        3,
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]),
    ),
    "regression": (SquaredError(), 1, torch.tensor([[0.3], [-1.2], [2.0], [0.1], [-0.4]])),
}


@pytest.mark.parametrize("packed", [True, False], ids=["compiled", "modules"])
@pytest.mark.parametrize("task", TASKS)
def test_the_first_step_of_a_head_and_its_adapter_is_that_of_pefts_seq_cls(
    tiny_base: Path, task: str, packed: bool
) -> None:
    decoder = load_decoder(tiny_base, device=CPU, team=Team(1) if packed else None)
    loss, labels, targets = TASKS[task]
    dataset, adapter = rows(5), make_adapter(decoder, LORA)
    tables = heads(decoder.spec.hidden_size, [labels])
    batch = head_pass(decoder, pack(dataset, range(5)), adapter)
    found = run(batch, Heads(0, loss), (tables, [0] * 5), targets, torch.full((5,), 0.2))

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=labels, problem_type=task, dtype=torch.float32, attn_implementation="eager"
    )
    names = sorted({path.rpartition(".")[2] for path in adapter.export()})
    config = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=names, task_type=peft.TaskType.SEQ_CLS)
    model: Any = peft.get_peft_model(base, config).eval()
    for path, (a, b) in adapter.export().items():
        layer = model.get_submodule(f"base_model.model.{path}")
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(b))
    score = model.base_model.model.score.modules_to_save["default"].weight
    score.copy_(tables.a(0, 0))
    given = targets[:, 0].long() if labels == 4 else targets
    with torch.enable_grad():
        reference = model(input_ids=read_ids(dataset), labels=given)
        reference.loss.backward()
    assert found.scores is not None
    torch.testing.assert_close(found.scores, reference.logits.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss.mean(), reference.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tables.grad_a(0, 0), score.grad, rtol=1e-4, atol=1e-5 * float(score.grad.abs().max()))
    assert_gradients(model, adapter, rtol=1e-4)


@pytest.mark.parametrize("mean", [False, True], ids=["last", "mean"])
def test_classes_of_two_heads_in_one_pass_are_learned_as_autograd_in_float64_learns_them(
    tiny_base: Path, mean: bool
) -> None:
    decoder = load_decoder(tiny_base, device=CPU)
    dataset, adapter = rows(5), make_adapter(decoder, LORA)
    tables, slots = heads(decoder.spec.hidden_size, [4, 3]), [0, 0, 1, 1, 1]
    targets, weights = torch.tensor([3, 0, 2, 1, 1]), torch.tensor([0.5, 1.0, -0.25, 2.0, 1.0])
    batch = head_pass(decoder, pack(dataset, range(5)), adapter)
    found = run(batch, Heads(0, ClassLoss(), mean=mean), (tables, slots), targets[:, None].float(), weights)

    model, finished = theirs(tiny_base, adapter, dataset)
    own = [torch.nn.Parameter(tables.a(0, slot).double()) for slot in (0, 1)]
    with torch.enable_grad():
        pooled = finished.mean(dim=1) if mean else finished[:, -1]
        scores = [pooled[row] @ own[slot].t() for row, slot in enumerate(slots)]
        losses = torch.stack([F.cross_entropy(score, target) for score, target in zip(scores, targets, strict=True)])
        (weights * losses).sum().backward()
    torch.testing.assert_close(found.loss, losses.detach().float(), rtol=1e-5, atol=1e-5)
    assert found.correct.tolist() == [int(s.argmax()) == t for s, t in zip(scores, targets.tolist(), strict=True)]
    for slot, head in enumerate(own):
        torch.testing.assert_close(tables.grad_a(0, slot), head.grad.float(), rtol=1e-4, atol=1e-5)
    assert_gradients(model, adapter, rtol=1e-4)


def test_a_reward_head_learns_from_pairs_as_autograd_says(tiny_base: Path) -> None:
    """One label whose score is compared: Bradley-Terry is the preference objective with β 1 and no reference."""
    decoder = load_decoder(tiny_base, device=CPU)
    dataset, adapter = rows(6, rows_per_example=2), make_adapter(decoder, LORA)
    tables, part = heads(decoder.spec.hidden_size, [1]), pack(dataset, range(6))
    objective = PreferenceLoss(1.0, 3, np.zeros(6, np.float32))
    found = run(
        head_pass(decoder, part, adapter),
        Heads(0, NegatedScore()),
        (tables, [0] * 6),
        torch.zeros(6, 1),
        lambda known: objective.coefficients(part, known.loss),
    )

    model, finished = theirs(tiny_base, adapter, dataset)
    head = torch.nn.Parameter(tables.a(0, 0).double())
    with torch.enable_grad():
        reward = (finished[:, -1] @ head.t())[:, 0]
        F.logsigmoid(reward[0::2] - reward[1::2]).mean().neg().backward()
    torch.testing.assert_close(-found.loss, reward.detach().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tables.grad_a(0, 0), head.grad.float(), rtol=1e-3, atol=1e-5)
    assert_gradients(model, adapter)


ROLES = torch.tensor([[0.0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1]])


def test_embeddings_learn_info_nce_among_all_candidates_as_autograd_in_float64_says(tiny_base: Path) -> None:
    decoder = load_decoder(tiny_base, device=CPU)
    dataset, adapter = rows(7), make_adapter(decoder, LORA)
    batch = head_pass(decoder, pack(dataset, range(7)), adapter)
    anchors = ROLES[:, 1] == 0
    kind = Heads(None, ContrastiveLoss(0.05), mean=True)
    found = run(batch, kind, (adapter.tables, [0] * 7), ROLES, anchors / 3.0)

    model, finished = theirs(tiny_base, adapter, dataset)
    with torch.enable_grad():
        unit = F.normalize(finished.mean(dim=1), dim=1)
        similar = unit[[0, 3, 5]] @ unit[[1, 2, 4, 6]].t() / 0.05
        losses = F.cross_entropy(similar, torch.tensor([0, 2, 3]), reduction="none")
        losses.mean().backward()
    torch.testing.assert_close(found.loss[anchors], losses.detach().float(), rtol=1e-5, atol=1e-5)
    assert not found.loss[~anchors].any()
    assert found.correct[anchors].tolist() == (similar.argmax(dim=1) == torch.tensor([0, 2, 3])).tolist()
    assert_gradients(model, adapter, rtol=2e-4)


def test_rows_of_another_adapter_in_the_pass_are_nobodys_negatives(tiny_base: Path) -> None:
    decoder = load_decoder(tiny_base, device=CPU)
    first = make_adapter(decoder, LORA)
    second = make_adapter(decoder, LORA, seed=1, arena=first._arena)
    kind = Heads(None, ContrastiveLoss(), mean=True)
    parts = [replace(pack(rows(14), range(i, i + 7)), labels=ROLES.numpy()) for i in (0, 7)]
    batch = load_pass(decoder, [Part(parts[0], first), Part(parts[1], second)], first.tables, kind)
    beside = finish(forward(decoder, batch))
    alone = finish(forward(decoder, load_pass(decoder, [Part(parts[0], first)], first.tables, kind)))
    assert torch.equal(beside.part(batch.learned[0]).loss, alone.loss)
    assert beside.part(batch.learned[1]).loss.any()


class Passes:
    """A run that has a work passed, and ends."""

    def __init__(self, host: TrainingHost, work: Work) -> None:
        self._queue, self._work = host.queue, work

    def __iter__(self) -> Iterator[None]:
        self._queue.submit(self._work)
        while not self._work.done:
            yield None

    def stop(self, *, pause: bool) -> None:
        raise NotImplementedError

    def put(self, command: RunCommand) -> Refused | None:
        raise NotImplementedError

    def acknowledge(self, count: int) -> None:
        raise NotImplementedError


def test_works_say_what_reads_them_and_only_those_of_one_readout_share_a_pass(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters learn embeddings, and a third one learns tokens beside them."""
    decoder, works, passes = load_decoder(tiny_base, device=CPU), dict[str, Work](), list[list[Work]]()
    pairs = replace(pack(rows(7), range(7)), labels=ROLES.numpy())
    kind: ReadoutKind = Heads(None, ContrastiveLoss(), mean=True)
    asked = {"first": (pairs, kind), "second": (pairs, kind), "third": (pack(rows(2), range(2)), TOKENS)}

    def start(host: TrainingHost, spec: TrainSpec | SessionSpec) -> Run:
        adapter, (packed, readout) = host.arena.add(LORA), asked[spec.run_id]
        adapter.initialise(len(works))
        works[spec.run_id] = Work(spec.run_id, "group", [packed], adapter, MeanLoss(2), readout=readout)
        return Passes(host, works[spec.run_id])

    training, run_works = FusedTraining(decoder, start=start), FusedTraining._run
    monkeypatch.setattr(FusedTraining, "_run", lambda self, chosen: passes.append(chosen) or run_works(self, chosen))
    for name in asked:
        training.start(SessionSpec(run_id=name, share_group="group", workdir="", base_model=""))
    list(training)
    assert [sorted(work.run_id for work in chosen) for chosen in passes] == [["first", "second"], ["third"]]
    for name, (packed, own) in asked.items():
        batch = load_pass(decoder, [Part(packed, works[name].adapter)], training.host.arena.tables, own)
        alone = finish(forward(decoder, batch))
        assert torch.equal(works[name].results[0].loss, alone.loss)
        assert works[name].results[0].scores is None or own is kind


@pytest.mark.parametrize("packed", [True, False], ids=["compiled", "modules"])
@pytest.mark.parametrize("keep", [Keep.ALL, Keep.INPUTS])
def test_a_backward_pass_stops_at_the_first_trained_layer_and_gives_it_the_same_gradient(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, keep: Keep
) -> None:
    decoder = load_decoder(tiny_base, device=CPU, team=Team(1) if packed else None)
    adapter, part = make_adapter(decoder, replace_layers(LORA, 2)), pack(rows(4), range(4))
    assert adapter.first_layer == len(decoder.layers) - 2 == 1
    found, visited = [], list[tuple[int, bool]]()
    for first in (1, 0):
        adapter.grad.zero_()
        batch = load(decoder, part, adapter)
        assert batch.first == 1
        batch.first = first
        with monkeypatch.context() as patch:
            spy(patch, decoder, batch, keep, visited)
            finish(forward_backward(decoder, batch, torch.full((4,), 0.25), keep=keep))
        found.append(adapter.grad.clone())
    assert visited == [(2, True), (1, False), (2, True), (1, True), (0, False)]
    assert found[0].any()
    assert torch.equal(*found)


def replace_layers(lora: LoraSpec, last: int) -> LoraSpec:
    return LoraSpec(rank=lora.rank, alpha=lora.alpha, last_layers=last)


def spy(patch: pytest.MonkeyPatch, decoder: Any, batch: Pass, keep: Keep, visited: list[tuple[int, bool]]) -> None:
    """Note which layers a backward pass visits, and whether they are to give a gradient further."""
    kind = type(layer_pass(decoder, batch.context, keep))
    backward = kind.backward

    def noting(self: Any, index: int, d_out: torch.Tensor, *, need_dx: bool = True) -> torch.Tensor | None:
        visited.append((index, need_dx))
        return backward(self, index, d_out, need_dx=need_dx)

    patch.setattr(kind, "backward", noting)
