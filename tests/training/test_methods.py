"""Sweeps, cross-validation, several tasks, and adapters that begin as others."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tenora.data.dataset import TokenizedDataset
from tenora.data.rows import ANSWERS
from tenora.model.decoder import Decoder
from tenora.training import learner
from tenora.training.corpus import Corpus
from tenora.training.events import (
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    FoldEvent,
    StepEvent,
    StoppedEvent,
    TrainEvent,
    TrialEvent,
)
from tenora.training.fusion import FusedTraining
from tenora.training.pass_queue import Work
from tenora.training.recipes import halving_rungs
from tenora.training.spec import LoraSpec, TaskSpec, TrainSpec, Trial, trial_of
from tests.data.rows import random_rows
from tests.support.full import full_but

from .runs import MakeSpec, TrainingRun, assert_same_bits, events_of, weights_of

RATES = (1e-4, 3e-3, 1e-2, 2e-2, 5e-3, 1e-5)
TRIALS: tuple[Trial, ...] = tuple(
    {"rank": rank, "alpha": 2.0 * rank, "learning_rate": rate, "n_epochs": 3, "batch_size": 4}
    for rank, rate in zip((2, 4, 8, 3, 16, 4), RATES, strict=True)
)


def learnable(make_spec: MakeSpec, tmp_path: Path, **changes: Any) -> TrainSpec:
    """Held-out rows that are among those to learn, so that more training is better."""
    TokenizedDataset.load(tmp_path / "train.npz").select(np.arange(6)).save(tmp_path / "valid.npz")
    return make_spec(lora=LoraSpec(rank=4, alpha=8.0), tokens_per_microbatch=200, **changes)


class TestSweep:
    def test_the_best_trial_wins_with_what_it_would_get_alone(
        self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
    ) -> None:
        spec = learnable(make_spec, tmp_path, trials=TRIALS)
        events = events_of(TrainingRun(decoder, spec))
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        last = {event.trial: event for event in events if isinstance(event, TrialEvent)}
        assert sorted(last) == list(range(6))
        statuses = [last[number].status for number in range(6)]
        assert sorted(statuses) == ["finished"] + ["stopped"] * 5
        assert finished.trial == statuses.index("finished")
        assert last[finished.trial].step == last[finished.trial].total_steps == finished.steps
        assert all(event.step < event.total_steps for event in last.values() if event.status == "stopped")
        # What was stopped was no better where it was compared.
        assert all(event.valid_loss >= finished.valid_loss for event in last.values() if event.valid_loss is not None)
        trial: dict[str, Any] = TRIALS[finished.trial]
        solo = learnable(make_spec, tmp_path, n_epochs=3, learning_rate=trial["learning_rate"])
        shape = LoraSpec(rank=trial["rank"], alpha=trial["alpha"])
        solo = msgspec.structs.replace(solo, lora=shape, batch_size=4)
        theirs = events_of(TrainingRun(decoder, solo))[-1]
        assert_same_bits(weights_of(finished), weights_of(theirs))

    def test_trials_with_other_batch_sizes_get_what_they_would_get_alone(
        self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
    ) -> None:
        trials = tuple(TRIALS[1] | {"batch_size": size} for size in (4, 5, 12))
        spec = learnable(make_spec, tmp_path, trials=trials, eval_interval=1)
        events = events_of(TrainingRun(decoder, spec))
        for number in range(len(trials)):
            told = [event for event in events if isinstance(event, TrialEvent) and event.trial == number]
            alone = trial_of(learnable(make_spec, tmp_path, trials=trials, eval_interval=1), number)
            theirs = [event for event in events_of(TrainingRun(decoder, alone)) if isinstance(event, EvalEvent)]
            best = list(accumulate((event.valid_loss for event in theirs[1:]), min))
            assert told
            assert [event.valid_loss for event in told] == [best[event.step - 1] for event in told]

    @pytest.mark.parametrize("share", full_but(0.6, (0.2, 0.6, 0.9)))
    def test_a_sweep_that_was_paused_goes_on_to_the_same_bits(
        self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path, share: float
    ) -> None:
        whole = events_of(TrainingRun(decoder, learnable(make_spec, tmp_path, trials=TRIALS)))
        spec = learnable(make_spec, tmp_path, trials=TRIALS)
        run = TrainingRun(decoder, spec)
        trials = 0
        for item in run:
            trials += isinstance(item, TrialEvent)
            if trials >= share * sum(isinstance(event, TrialEvent) for event in whole):
                run.stop(pause=True)
        rest = events_of(TrainingRun(decoder, spec))
        assert_same_bits(weights_of(rest[-1]), weights_of(whole[-1]))
        assert isinstance(rest[-1], FinishedEvent)
        assert rest[-1].trial == whole[-1].trial
        assert rest[-1].trained_tokens == whole[-1].trained_tokens

    def test_the_tokens_of_all_trials_count(self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path) -> None:
        spec = learnable(make_spec, tmp_path, trials=TRIALS)
        run = TrainingRun(decoder, spec)
        events = events_of(run)
        finished, trials = events[-1], [event for event in events if isinstance(event, TrialEvent)]
        assert isinstance(finished, FinishedEvent)
        assert finished.trained_tokens == run.passed_tokens
        told = [event.trained_tokens for event in trials]
        assert told == sorted(told)
        assert told[-1] == finished.trained_tokens
        corpus = Corpus.load(spec.tasks, kind=ANSWERS)
        batches = [corpus.batch(step, 4, seed=spec.seed) for step in range(12)]
        tokens = [sum(int(corpus.train.row(row)[1].sum()) for row in batch) for batch in batches]
        last = {event.trial: event for event in trials}
        assert finished.trained_tokens == sum(sum(tokens[: event.step]) for event in last.values())
        assert len({event.step for event in last.values()}) > 1, "some were stopped before others"

    def test_a_trial_says_the_loss_that_it_was_just_measured_at(
        self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
    ) -> None:
        events = events_of(TrainingRun(decoder, learnable(make_spec, tmp_path, trials=TRIALS)))
        assert all(event.valid_loss is not None for event in events if isinstance(event, TrialEvent))

    def test_a_trial_that_fails_does_so_alone(self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path) -> None:
        trials = (*TRIALS[:3], TRIALS[3] | {"rank": 0})
        failed = events_of(TrainingRun(decoder, learnable(make_spec, tmp_path, trials=trials)))[-1]
        assert isinstance(failed, FailedEvent)  # what cannot even begin is the request's fault
        wild = (*TRIALS[:3], TRIALS[3] | {"learning_rate": 1e30, "n_epochs": 30})
        spec = learnable(make_spec, tmp_path, trials=wild, max_grad_norm=0.0, warmup_ratio=0.0)
        events = events_of(TrainingRun(decoder, spec))
        last = {event.trial: event for event in events if isinstance(event, TrialEvent)}
        assert (last[3].status, "not a finite number" in last[3].reason) == ("failed", True)
        assert isinstance(events[-1], FinishedEvent)
        assert events[-1].trial != 3

    def test_all_trials_share_passes(
        self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[list[Work]] = []
        run = FusedTraining._run
        monkeypatch.setattr(FusedTraining, "_run", lambda self, works: passes.append(works) or run(self, works))
        events_of(TrainingRun(decoder, learnable(make_spec, tmp_path, trials=TRIALS, general_text=(5, 9, 30))))
        assert max(len(works) for works in passes) == 6
        of_base = {id(work) for works in passes for work in works if work.adapter is None}
        assert len(of_base) == 2, "the base is measured once for all, on the held-out rows and on the general text"

    @pytest.mark.parametrize("trials", [1, 2, 3, 4, 12, 30])
    def test_rungs_go_on_to_the_end_with_fewer_and_fewer(self, trials: int) -> None:
        found = halving_rungs(trials)
        assert found[-1][0] == 1.0
        shares, survivors = zip(*found, strict=True)
        assert all(left < right for left, right in pairwise(shares))
        assert all(left >= right for left, right in pairwise((trials, *survivors)))
        epochs = sum(
            share * going
            for share, going in zip(
                [b - a for a, b in pairwise((0.0, *shares))], (trials, *survivors[:-1]), strict=True
            )
        )
        assert epochs <= 0.5 * trials or trials <= 3


def with_ends(starts: TokenizedDataset, ends: TokenizedDataset) -> TokenizedDataset:
    """Rows of `starts`, each continued as a row of `ends`, in turn."""
    rows = [(starts.row(index), ends.row(index % len(ends))) for index in range(len(starts))]
    return TokenizedDataset(
        tokens=np.concatenate([part for start, end in rows for part in (start[0], end[0])]),
        weights=np.concatenate([part for start, end in rows for part in (start[1], end[1])]),
        offsets=np.cumsum([0, *(len(start[0]) + len(end[0]) for start, end in rows)]).astype(np.int64),
        lines=starts.lines,
    )


class TestFolds:
    @pytest.fixture
    def spec(self, make_spec: MakeSpec, tmp_path: Path) -> TrainSpec:
        """12 rows that end alike, so that folds have something in common to learn, and begin differently."""
        rows = with_ends(random_rows(12, seed=3, longest=12), random_rows(4, seed=4))
        rows.save(tmp_path / "few.npz")
        task = TaskSpec(name="rows", train_path=str(tmp_path / "few.npz"))
        return make_spec(
            tasks=(task,), folds=4, n_epochs=6, batch_size=3, lora=LoraSpec(rank=4, alpha=8.0), learning_rate=1e-2
        )

    def test_every_row_is_measured_by_an_adapter_that_has_not_seen_it(self, decoder: Decoder, spec: TrainSpec) -> None:
        rows = TokenizedDataset.load(Path(spec.tasks[0].train_path))
        corpus = Corpus.load(spec.tasks, kind=ANSWERS)
        parts = [corpus.fold(number, 4, seed=spec.seed) for number in range(4)]
        assert sorted(np.concatenate([held_out for _, held_out in parts])) == list(range(12))
        for part, held_out in parts:
            assert len(part.train) + len(part.valid) == 12
            assert np.array_equal(part.valid.lines, rows.lines[held_out])
        events = events_of(TrainingRun(decoder, spec))
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        evaluations = [event for event in events if isinstance(event, EvalEvent)]
        assert [event.step for event in evaluations] == [0, 4, 8, 12, 16, 20, 24]
        best = min(evaluations[1:], key=lambda event: event.valid_loss)
        assert finished.steps == best.step
        assert finished.valid_loss == best.valid_loss < finished.base_loss
        held_out = finished.held_out
        assert held_out is not None
        assert len(held_out.adapter) == len(held_out.start) == 12
        assert sum(held_out.tokens) == rows.num_trained
        assert sum(held_out.adapter) / sum(held_out.tokens) == pytest.approx(finished.valid_loss)
        steps = [event.step for event in events if isinstance(event, StepEvent)]
        assert steps == list(range(1, best.step + 1)), "the fit on all rows, and nothing of the folds"

    def test_the_folds_tell_how_far_they_are_and_their_tokens_count(self, decoder: Decoder, spec: TrainSpec) -> None:
        run = TrainingRun(decoder, spec)
        events = events_of(run)
        assert isinstance(events[-1], FinishedEvent)
        folds = [event for event in events if isinstance(event, FoldEvent)]
        assert events.index(folds[-1]) < min(events.index(event) for event in events if isinstance(event, EvalEvent))
        for number in range(4):
            own = [event for event in folds if event.fold == number]
            assert [event.step for event in own] == [3 * epoch for epoch in range(1, 7)]
            assert {event.total_steps for event in own} == {18}
            losses = [event.valid_loss for event in own]
            assert losses == sorted(losses, reverse=True)  # the best so far
            assert losses[-1] < own[0].base_loss
        done = [event.done for event in folds]
        assert done == sorted(done)
        assert (done[-1], {event.done_before for event in folds}) == (1.0, {0.0})
        told = [event.trained_tokens for event in events if isinstance(event, FoldEvent | StepEvent | FinishedEvent)]
        assert told == sorted(told)
        assert told[-1] == told[-2] == run.passed_tokens

    def test_the_result_has_learned_all_rows_and_is_probed(self, decoder: Decoder, spec: TrainSpec) -> None:
        finished = events_of(TrainingRun(decoder, spec))[-1]
        assert isinstance(finished, FinishedEvent)
        assert finished.probe is not None
        rows = TokenizedDataset.load(Path(finished.probe.path))
        again = msgspec.structs.replace(
            spec,
            folds=0,
            init_path=finished.path,
            tasks=(msgspec.structs.replace(spec.tasks[0], valid_path=spec.tasks[0].train_path),),
            workdir=spec.workdir + "-again",
            n_epochs=1,
        )
        first = next(event for event in events_of(TrainingRun(decoder, again)) if isinstance(event, EvalEvent))
        assert first.valid_loss < finished.base_loss
        assert [len(row) for row in finished.probe.rows] == [int(rows.row(row)[1].sum()) for row in range(4)]

    def test_a_paused_cross_validation_goes_on_to_the_same_bits(self, decoder: Decoder, spec: TrainSpec) -> None:
        whole = list(TrainingRun(decoder, msgspec.structs.replace(spec, workdir=spec.workdir + "-whole")))
        end = whole[-1]
        assert isinstance(end, FinishedEvent)
        told = [event for event in whole if isinstance(event, FoldEvent)]
        for share in (0.3, 0.7, 0.97):
            own = msgspec.structs.replace(spec, workdir=f"{spec.workdir}-{share}")
            run, last, before = TrainingRun(decoder, own), None, 0
            for number, item in enumerate(run):
                last = item
                before += isinstance(item, FoldEvent)
                if number == int(share * len(whole)):
                    run.stop(pause=True)
            assert isinstance(last, StoppedEvent)
            rest = events_of(TrainingRun(decoder, own))
            assert_same_bits(weights_of(rest[-1]), weights_of(end))
            assert isinstance(rest[-1], FinishedEvent)
            assert rest[-1].trained_tokens == end.trained_tokens
            folds = [event for event in rest if isinstance(event, FoldEvent)]
            assert len(folds) == len(told) - before
            for event in folds:
                assert told[before - 1].done <= event.done_before < event.done <= 1.0
            last_told, last_of_rest = ({event.fold: event.valid_loss for event in some} for some in (told, folds))
            assert last_of_rest.items() <= last_told.items()


class TestTasks:
    def test_each_task_has_a_held_out_loss_of_its_own(
        self, decoder: Decoder, make_spec: MakeSpec, tmp_path: Path
    ) -> None:
        tasks = []
        for number, (name, weight) in enumerate((("law", 1.0), ("medicine", 0.5))):
            paths = [tmp_path / f"{name}-{kind}.npz" for kind in ("train", "valid")]
            random_rows(8, seed=50 + number).save(paths[0])
            random_rows(3 + number, seed=60 + number).save(paths[1])
            tasks.append(TaskSpec(name=name, train_path=str(paths[0]), valid_path=str(paths[1]), weight=weight))
        spec = make_spec(tasks=tuple(tasks), lora=LoraSpec(rank=4))
        events = events_of(TrainingRun(decoder, spec))
        evaluations = [event for event in events if isinstance(event, EvalEvent)]
        for task in tasks:
            alone = make_spec(tasks=(task,), lora=LoraSpec(rank=4))
            first = next(event for event in events_of(TrainingRun(decoder, alone)) if isinstance(event, EvalEvent))
            assert evaluations[0].tasks[task.name] == pytest.approx(first.valid_loss, rel=1e-6)
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        assert set(finished.tasks) == {"law", "medicine"}
        assert finished.tasks == evaluations[-1].tasks or finished.step != evaluations[-1].step
        assert finished.steps == 2 * 3, "8 + 4 rows an epoch in batches of 4"


class TestStart:
    @pytest.fixture
    def parent(self, decoder: Decoder, make_spec: MakeSpec) -> FinishedEvent:
        finished = events_of(TrainingRun(decoder, make_spec(lora=LoraSpec(rank=4, alpha=8.0))))[-1]
        assert isinstance(finished, FinishedEvent)
        return finished

    @pytest.mark.parametrize(
        "lora",
        [
            LoraSpec(rank=4, alpha=8.0),
            LoraSpec(rank=4, alpha=16.0),
            LoraSpec(rank=9, alpha=18.0),
            LoraSpec(rank=6, alpha=6.0, use_rslora=True),
        ],
        ids=["as-it-is", "another-scale", "higher-rank", "rslora"],
    )
    def test_it_begins_as_its_parent(
        self, decoder: Decoder, make_spec: MakeSpec, parent: FinishedEvent, lora: LoraSpec
    ) -> None:
        events = events_of(TrainingRun(decoder, make_spec(lora=lora, init_path=parent.path)))
        first = next(event for event in events if isinstance(event, EvalEvent))
        assert first.step == 0
        assert first.valid_loss == pytest.approx(parent.valid_loss, rel=1e-5)
        assert first.base_loss == first.valid_loss
        finished = events[-1]
        assert isinstance(finished, FinishedEvent)
        a = next(tensor for name, tensor in weights_of(finished).items() if "lora_A" in name)
        assert a.shape[0] == lora.rank

    def test_new_modules_begin_as_the_base(self, decoder: Decoder, make_spec: MakeSpec) -> None:
        narrow = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
        parent = events_of(TrainingRun(decoder, make_spec(lora=narrow)))[-1]
        assert isinstance(parent, FinishedEvent)
        wide = make_spec(lora=LoraSpec(rank=4, alpha=8.0), init_path=parent.path)
        first = next(event for event in events_of(TrainingRun(decoder, wide)) if isinstance(event, EvalEvent))
        assert first.valid_loss == pytest.approx(parent.valid_loss, rel=1e-5)

    @pytest.mark.parametrize(
        "lora", [LoraSpec(rank=3, alpha=6.0), LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj",))]
    )
    def test_what_would_lose_something_is_refused(
        self, decoder: Decoder, make_spec: MakeSpec, parent: FinishedEvent, lora: LoraSpec
    ) -> None:
        failed = events_of(TrainingRun(decoder, make_spec(lora=lora, init_path=parent.path)))[-1]
        assert isinstance(failed, FailedEvent)
        assert failed.code == "init_from_mismatch"


def test_early_stopping_ends_a_run_that_no_longer_gets_better(
    decoder: Decoder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, losses = learner.measure, iter([13.0, 12.0, 11.0, 11.5, 11.2, 11.0])

    def told(*args: Any, **keywords: Any) -> Iterator[Any]:
        found = yield from measure(*args, **keywords)
        found.loss = next(losses)
        return found

    monkeypatch.setattr(learner, "measure", told)
    events: list[TrainEvent] = events_of(TrainingRun(decoder, make_spec(eval_interval=1, early_stopping=2)))
    finished = events[-1]
    assert isinstance(finished, FinishedEvent)
    assert (finished.step, finished.steps, finished.stopped_early, finished.last_loss) == (2, 4, True, 11.2)
