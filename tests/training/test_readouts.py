"""Readouts under whole training passes: a head of labels against PEFT, transformers and autograd."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tenora.data.dataset import TokenizedDataset
from tenora.model.executors.layers import Keep
from tenora.model.loading import load_decoder
from tenora.model.readouts.base import ReadoutKind
from tenora.model.readouts.labels import LabelReadout, Labels
from tenora.model.readouts.tokens import TOKENS
from tenora.training.arena import TrainedAdapter
from tenora.training.commands import Refused, RunCommand
from tenora.training.fusion import FusedTraining, Run
from tenora.training.methods.dpo import PreferenceLoss
from tenora.training.methods.supervised import MeanLoss
from tenora.training.packing import pack
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


def theirs(directory: Path, adapter: TrainedAdapter, dataset: TokenizedDataset) -> tuple[Any, torch.Tensor]:
    """PEFT's model and its finished hidden states [rows, H] where each row is read."""
    model = peft_model(directory, LORA, adapter)
    ids = torch.from_numpy(dataset.tokens.astype(np.int64)).view(-1, 6)[:, :5]
    with torch.enable_grad():
        return model, model(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -1]


def assert_gradients(model: Any, adapter: TrainedAdapter) -> None:
    for target in adapter._modules():
        reference = model.get_submodule(f"base_model.model.{target.path}").lora_A["default"].weight.grad
        found = adapter.tables.grad_a(target.row, 0)
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()) + 1e-7)


def run(
    batch: Pass, readout: LabelReadout, targets: torch.Tensor, objective: torch.Tensor | Coefficients
) -> TokenLosses:
    batch.readout, batch.targets = readout, targets
    return finish(forward_backward(readout.decoder, batch, objective, keep=Keep.ALL))


@pytest.mark.parametrize("packed", [True, False], ids=["compiled", "modules"])
def test_classes_of_two_heads_in_one_pass_are_learned_as_autograd_learns_them(tiny_base: Path, packed: bool) -> None:
    decoder = load_decoder(tiny_base, device=CPU, team=Team(1) if packed else None)
    dataset, adapter = rows(5), make_adapter(decoder, LORA)
    tables, slots = heads(decoder.spec.hidden_size, [4, 3]), [0, 0, 1, 1, 1]
    targets, weights = torch.tensor([3, 0, 2, 1, 1]), torch.tensor([0.5, 1.0, -0.25, 2.0, 1.0])
    batch = load(decoder, pack(dataset, range(5)), adapter)
    found = run(batch, LabelReadout(decoder, tables, 0, slots), targets, weights)

    model, finished = theirs(tiny_base, adapter, dataset)
    own = [torch.nn.Parameter(tables.a(0, slot).clone()) for slot in (0, 1)]
    with torch.enable_grad():
        scores = [finished[row] @ own[slot].t() for row, slot in enumerate(slots)]
        losses = torch.stack([F.cross_entropy(score, target) for score, target in zip(scores, targets, strict=True)])
        (weights * losses).sum().backward()
    torch.testing.assert_close(found.loss, losses.detach(), rtol=1e-4, atol=1e-5)
    assert found.correct.tolist() == [int(s.argmax()) == t for s, t in zip(scores, targets.tolist(), strict=True)]
    for slot, head in enumerate(own):
        torch.testing.assert_close(tables.grad_a(0, slot), head.grad, rtol=1e-3, atol=1e-5)
    assert_gradients(model, adapter)


def test_a_reward_head_learns_from_pairs_as_autograd_says(tiny_base: Path) -> None:
    """One label whose score is compared: Bradley-Terry is the preference objective with β 1 and no reference."""
    decoder = load_decoder(tiny_base, device=CPU)
    dataset, adapter = rows(6, rows_per_example=2), make_adapter(decoder, LORA)
    tables, part = heads(decoder.spec.hidden_size, [1]), pack(dataset, range(6))
    objective = PreferenceLoss(1.0, 3, np.zeros(6, np.float32))
    readout = LabelReadout(decoder, tables, 0, [0] * 6, normalised=False)
    found = run(
        load(decoder, part, adapter),
        readout,
        torch.zeros(6, dtype=torch.int64),
        lambda known: objective.coefficients(part, known.loss),
    )

    model, finished = theirs(tiny_base, adapter, dataset)
    head = torch.nn.Parameter(tables.a(0, 0).clone())
    with torch.enable_grad():
        reward = (finished @ head.t())[:, 0]
        F.logsigmoid(reward[0::2] - reward[1::2]).mean().neg().backward()
    torch.testing.assert_close(-found.loss, reward.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tables.grad_a(0, 0), head.grad, rtol=1e-3, atol=1e-5)
    assert_gradients(model, adapter)


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


def test_works_say_what_reads_them_and_only_those_of_one_readout_share_a_pass(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters learn labels, each its own head's, and a third one learns tokens beside them."""
    decoder, works, passes = load_decoder(tiny_base, device=CPU), dict[str, Work](), list[list[Work]]()
    tables, part = heads(decoder.spec.hidden_size, [4, 3, 1]), pack(rows(2), range(2))
    labels = replace(part, targets=np.array([2, 0]))
    kind: ReadoutKind = Labels(lambda: tables, 0)
    asked = {"first": (labels, kind), "second": (labels, kind), "third": (part, TOKENS)}

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
    for slot, name in enumerate(asked):
        packed, own = asked[name]
        batch = load_pass(decoder, [Part(packed, works[name].adapter)], training.host.arena.tables, own)
        alone = finish(forward(decoder, batch))
        assert torch.equal(works[name].results[0].loss, alone.loss)
        if isinstance(batch.readout, LabelReadout):
            assert batch.readout.slots == [slot, slot]
            assert tables.grad_a(0, slot).abs().sum() > 0
    assert tables.grad_a(0, 2).abs().sum() == 0
