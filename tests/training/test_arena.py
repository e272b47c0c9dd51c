"""Masters are float32; passes read them in the type of the base, and always as they are now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora.training.arena import TrainingArena
from tenora.training.events import FinishedEvent, StepEvent, StoppedEvent
from tenora.training.spec import LoraSpec
from tenora_kernels import ops
from tenora_kernels.layout import LoraBatch, LoraSite, LoraTables
from tests.kernels.gpu.launches import TRAINED, OperandTypes

from .runs import MakeSpec, TrainingRun, events_of, weights_of

CPU = torch.device("cpu")


@pytest.fixture
def half(tiny_base: Path) -> Decoder:
    return load_decoder(tiny_base, dtype=torch.bfloat16)


class Spy:
    """The backend of every low-rank product from here on: what types came."""

    def __init__(self) -> None:
        self.types: set[OperandTypes] = set()
        self.calls = 0
        self._select = ops.select_backend

    def __call__(self, y: Tensor, x: Tensor, tables: LoraTables) -> Any:
        real = self._select(y, x, tables)
        spy = self

        class Backend:
            @staticmethod
            def forward(y: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch) -> None:
                spy.calls += 1
                real.forward(y, x, site, batch)

            @staticmethod
            def backward(dy: Tensor, x: Tensor, site: LoraSite, batch: LoraBatch, dx: Tensor | None) -> None:
                grad = batch.tables.grad
                assert grad is not None
                if dx is not None:
                    spy.types.add(OperandTypes(dy.dtype, x.dtype, batch.tables.arena.dtype, grad.dtype, dx.dtype))
                real.backward(dy, x, site, batch, dx)

        return Backend


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr(ops, "select_backend", found)
    return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """At every pass from here on: whether what it reads are the masters of that moment, rounded."""
    from tenora.training import fusion

    fresh: list[bool] = []
    load = fusion.load_pass
    arenas: list[TrainingArena] = []
    make = fusion.TrainingArena

    def made(*args: Any, **options: Any) -> TrainingArena:
        arenas.append(make(*args, **options))
        return arenas[-1]

    def loaded(*args: Any) -> Any:
        arena = arenas[-1]
        fresh.append(torch.equal(arena.tables.arena, arena.masters.arena.to(arena.tables.arena.dtype)))
        return load(*args)

    monkeypatch.setattr(fusion, "TrainingArena", made)
    monkeypatch.setattr(fusion, "load_pass", loaded)
    return fresh


def test_a_bfloat16_base_trains_with_the_types_that_the_kernels_are_compiled_and_tested_for(
    half: Decoder, make_spec: MakeSpec, spy: Spy
) -> None:
    """x, dY and the weights in two bytes, gradients in four: with four-byte weights no product ran on tensor cores."""
    events = events_of(TrainingRun(half, make_spec()))
    assert isinstance(events[-1], FinishedEvent)
    assert spy.calls > 0
    assert spy.types == {TRAINED}
    assert {TRAINED.x, TRAINED.weights} == {torch.bfloat16}
    assert {TRAINED.grad, TRAINED.dx} == {torch.float32}


def test_every_pass_reads_the_masters_of_now(half: Decoder, make_spec: MakeSpec, watched: list[bool]) -> None:
    """After the start, after each optimizer step, and in a run that was paused and is taken up again."""
    spec = make_spec()
    run = TrainingRun(half, spec)
    for event in run:
        if isinstance(event, StepEvent) and event.step == 3:
            run.stop(pause=True)
        if isinstance(event, StoppedEvent):
            break
    before = len(watched)
    events = events_of(TrainingRun(half, spec))
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    assert steps[0] > 1, "it went on from where it was"
    assert len(watched) > before > 0
    assert all(watched)


def test_a_float32_base_trains_on_the_masters_themselves(decoder: Decoder) -> None:
    arena = TrainingArena(table_rows(decoder.spec), device=CPU)
    adapter = arena.add(LoraSpec(rank=2, alpha=4.0))
    assert arena.tables is arena.masters
    assert adapter.weights.data_ptr() == arena.tables.arena.data_ptr()


def test_neighbours_that_come_and_go_move_both(decoder: Decoder) -> None:
    arena = TrainingArena(table_rows(decoder.spec), device=CPU, dtype=torch.bfloat16)
    first, second = (arena.add(LoraSpec(rank=rank, alpha=4.0)) for rank in (2, 3))
    first.initialise(1)
    second.initialise(2)
    second.weights.add_(2.0**-12)
    second.refresh()
    second.grad.fill_(0.5)
    wide = second.weights.clone()
    first.remove()
    assert second.weights.dtype == torch.float32
    assert torch.equal(second.weights, wide)
    assert torch.equal(arena.tables.arena, wide.bfloat16())
    assert (second.grad == 0.5).all()
    exported = second.export()
    for target in second._modules():
        assert torch.equal(
            torch.from_numpy(exported[target.path][0]).bfloat16(), arena.tables.a(target.row, second.slot)
        )


def test_bfloat16_learns_what_float32_learns(half: Decoder, decoder: Decoder, make_spec: MakeSpec) -> None:
    """Steps below the resolution of bfloat16 add up in the masters: the losses follow float32's."""
    found = []
    for base in (decoder, half):
        events = events_of(TrainingRun(base, make_spec(n_epochs=6)))
        found.append([event.train_loss for event in events if isinstance(event, StepEvent)])
        assert weights_of(events[-1])
    assert found[1][-1] < found[1][0] - 0.1
    assert found[1] == pytest.approx(found[0], abs=0.1)
