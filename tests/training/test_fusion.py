"""Many adapters in fused passes: each gets what it would get alone, and nothing that happens to one reaches another."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.training import fusion, watch
from tenora.training.events import FailedEvent, FinishedEvent, StepEvent, StoppedEvent
from tenora.training.fusion import FusedTraining
from tenora.training.pass_queue import Work
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec
from tenora_kernels.cpu.runtime.team import Team
from tests.data.rows import random_rows

from .runs import MakeSpec, assert_same_bits, comparable, weights_of

Events = dict[str, list[Any]]

SHAPES = [
    LoraSpec(rank=4, alpha=8.0, dropout=0.1),
    LoraSpec(rank=16, alpha=16.0),
    LoraSpec(rank=1, alpha=2.0, target_modules=("q_proj", "v_proj")),
    LoraSpec(rank=8, alpha=8.0, use_rslora=True, target_modules=("o_proj", "up_proj", "down_proj")),
    LoraSpec(rank=3, alpha=6.0, dropout=0.3),
    LoraSpec(rank=33, alpha=8.0, target_modules=("gate_proj",)),
]


def job(make_spec: MakeSpec, number: int, **changes: Any) -> TrainSpec:
    """A run with rows, shape, batch and length of its own."""
    spec = make_spec(lora=SHAPES[number], seed=number, batch_size=2 + number % 3, tokens_per_microbatch=60)
    directory = Path(spec.workdir).parent
    paths = [str(directory / f"{kind}-{number}.npz") for kind in ("train", "valid")]
    random_rows(6 + 2 * number, seed=20 + number).save(Path(paths[0]))
    random_rows(4, seed=40 + number).save(Path(paths[1]))
    task = TaskSpec(name="rows", train_path=paths[0], valid_path=paths[1])
    return msgspec.structs.replace(
        spec, run_id=f"run-{number}", share_group=f"tenant-{number % 2}", tasks=(task,), **changes
    )


def together(decoder: Decoder, specs: list[TrainSpec], tokens: int = 200) -> Events:
    """The events of runs that begin at the same time, by run."""
    training = FusedTraining(decoder, tokens_per_pass=tokens)
    for spec in specs:
        training.start(spec)
    events: Events = defaultdict(list)
    for event in training:
        if event is not None:
            events[event.run_id].append(event)
    assert len(training.host.arena) == 0
    return events


def alone(decoder: Decoder, spec: TrainSpec) -> list[Any]:
    """The events of a run by itself, in a work directory of its own."""
    own = msgspec.structs.replace(spec, workdir=spec.workdir + "-alone")
    return together(decoder, [own])[spec.run_id]


def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collects the runs of every pass."""
    seen: list[list[str]] = []
    run = FusedTraining._run

    def recorded(self: FusedTraining, works: list[Work]) -> Any:
        seen.append([work.run_id for work in works])
        return run(self, works)

    monkeypatch.setattr(FusedTraining, "_run", recorded)
    return seen


def test_an_adapter_of_a_mixed_batch_is_the_one_it_would_be_alone(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [job(make_spec, number) for number in range(6)]
    seen = passes(monkeypatch)
    mixed = together(decoder, specs)
    assert max(len(set(runs)) for runs in seen) >= 4
    for spec in specs:
        solo = alone(decoder, spec)
        left, right = weights_of(mixed[spec.run_id][-1]), weights_of(solo[-1])
        assert any(tensor.any() for tensor in left.values())
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-5)
        for ours, theirs in zip(mixed[spec.run_id], solo, strict=True):
            if isinstance(ours, StepEvent):
                assert (ours.step, ours.trained_tokens) == (theirs.step, theirs.trained_tokens)
                assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)


def test_on_packed_weights_it_is_the_same_adapter_to_the_bit(make_tiny: Any, make_spec: MakeSpec) -> None:
    """As `tenora serve` runs on a CPU without bfloat16: a row's numbers are its own, so fusing changes none."""
    decoder = load_decoder(make_tiny("smollm2"), device=torch.device("cpu"), dtype=torch.float32, team=Team.shared(2))
    assert decoder.stack is not None
    specs = [job(make_spec, number) for number in (1, 2, 3, 5)]  # those without dropout, which modules compute
    mixed = together(decoder, specs)
    for spec in specs:
        assert_same_bits(weights_of(mixed[spec.run_id][-1]), weights_of(alone(decoder, spec)[-1]))


def test_one_jobs_nan_and_anothers_cancellation_leave_the_others_bits(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [job(make_spec, number) for number in range(4)]
    undisturbed = together(decoder, [msgspec.structs.replace(spec, workdir=spec.workdir + "-a") for spec in specs])
    embed, poison = decoder.embed, 2  # no row has it
    rows = random_rows(8, seed=21)
    rows.tokens[:] = poison
    rows.save(Path(specs[1].tasks[0].train_path))
    monkeypatch.setattr(decoder, "embed", lambda ids: embed(ids).masked_fill((ids == poison)[:, None], torch.nan))
    clean = [random_rows(6 + 2 * number, seed=20 + number) for number in range(4)]
    assert not any((dataset.tokens == 250).any() for number, dataset in enumerate(clean) if number != 1), (
        "choose another"
    )
    training = FusedTraining(decoder, tokens_per_pass=200)
    for spec in specs:
        training.start(spec)
    events: Events = defaultdict(list)
    for event in training:
        if event is None:
            continue
        events[event.run_id].append(event)
        if isinstance(event, StepEvent) and (event.run_id, event.step) == ("run-3", 2):
            training.stop("run-3", pause=False)
    failed = events["run-1"][-1]
    assert isinstance(failed, FailedEvent)
    assert (failed.code, "step 1" in failed.message) == ("non_finite", True)
    assert isinstance(events["run-3"][-1], StoppedEvent)
    for run_id in ("run-0", "run-2"):
        assert_same_bits(weights_of(events[run_id][-1]), weights_of(undisturbed[run_id][-1]))
        assert comparable(events[run_id]) == comparable(undisturbed[run_id])


def test_memory_that_runs_out_for_one_job_ends_that_one(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [job(make_spec, number) for number in range(3)]
    undisturbed = together(decoder, [msgspec.structs.replace(spec, workdir=spec.workdir + "-a") for spec in specs])
    whole = fusion.forward_backward

    def scarce(*args: Any, **keywords: Any) -> Any:
        """Runs out after two layers wherever the second job (rank 16) takes part."""
        layers, lora = whole(*args, **keywords), args[1].context.lora
        yield next(layers)
        yield next(layers)
        if 16 in {int(lora.tables.ranks[:, slot].max()) for slot in lora.segments.seg_slot}:
            raise MemoryError
        return (yield from layers)

    monkeypatch.setattr(fusion, "forward_backward", scarce)
    events = together(decoder, specs)
    failed = events["run-1"][-1]
    assert isinstance(failed, FailedEvent)
    assert failed.code == "out_of_memory"
    for run_id in ("run-0", "run-2"):
        assert_same_bits(weights_of(events[run_id][-1]), weights_of(undisturbed[run_id][-1]))


def test_small_jobs_finish_early_and_groups_share_by_weight(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = msgspec.structs.replace(job(make_spec, 0, n_epochs=30), run_id="large", share_group="a")
    small = msgspec.structs.replace(job(make_spec, 1), run_id="small", share_group="b")
    training = FusedTraining(decoder, tokens_per_pass=1)  # a part a pass: no fusing, only turns
    training.start(large)
    ends: list[str] = []
    for number, event in enumerate(training):
        if number == 40:
            training.start(small)
        if isinstance(event, FinishedEvent):
            ends.append(event.run_id)
    assert ends == ["small", "large"]
    seen = passes(monkeypatch)
    large = msgspec.structs.replace(large, n_epochs=1000)
    heavy = msgspec.structs.replace(large, run_id="heavy", share_group="c", weight=3.0, workdir=large.workdir + "-h")
    light = msgspec.structs.replace(large, run_id="light", share_group="d", weight=1.0, workdir=large.workdir + "-l")
    training = FusedTraining(decoder, tokens_per_pass=1)
    training.start(heavy)
    training.start(light)
    while len(seen) < 200:
        training.advance()
    turns = [runs[0] for runs in seen[40:200]]
    assert turns.count("heavy") / turns.count("light") == pytest.approx(3.0, rel=0.2)


def test_runs_that_join_and_leave_do_not_move_the_others(decoder: Decoder, make_spec: MakeSpec) -> None:
    specs = [job(make_spec, number) for number in range(4)]
    training = FusedTraining(decoder, tokens_per_pass=200)
    training.start(specs[0])
    events: Events = defaultdict(list)
    for number, event in enumerate(training):
        if number in (10, 25, 31):
            training.start(specs[(10, 25, 31).index(number) + 1])
        if event is not None:
            events[event.run_id].append(event)
    for spec in specs:
        assert_same_bits(weights_of(events[spec.run_id][-1]), weights_of(alone(decoder, spec)[-1]))


def test_without_packing_every_row_has_a_pass_and_the_result_is_the_same(decoder: Decoder, make_spec: MakeSpec) -> None:
    packed, single = job(make_spec, 1), job(make_spec, 1, packing=False)
    left, right = (
        alone(decoder, packed)[-1],
        alone(decoder, msgspec.structs.replace(single, workdir=single.workdir + "s"))[-1],
    )
    for name, tensor in weights_of(left).items():
        torch.testing.assert_close(tensor, weights_of(right)[name], rtol=0, atol=1e-5)


def test_a_loss_that_stays_far_above_its_start_stops_the_run_and_says_where(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "DIVERGED_NATS", -5.0)  # so that every loss is far above
    monkeypatch.setattr(watch, "DIVERGED_RATIO", 0.1)
    failed = alone(decoder, job(make_spec, 1))[-1]
    assert isinstance(failed, FailedEvent)
    assert failed.code == "diverged"
    assert "loss of step 3" in failed.message
    assert "lines " in failed.message
