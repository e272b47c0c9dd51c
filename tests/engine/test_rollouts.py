"""A run that waits for sequences: its adapter as it is in training, generating beside everybody's requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Outputs, PutCommand, StartSession, StartTraining, StopTraining, Training
from tenora.model.sampling import SamplingParams
from tenora.training.commands import (
    AdamWSettings,
    ForwardBackward,
    OptimStep,
    Refused,
    Row,
    RunCommand,
    Sample,
    Sampled,
    SaveAdapter,
    SessionReady,
)
from tenora.training.events import FinishedEvent, StoppedEvent
from tenora.training.spec import LoraSpec, SessionSpec
from tests.engine.driver import Driver, MakeDriver, ref_of
from tests.engine.requests import generate, prompt, sampling
from tests.engine.test_training import SENTENCE, make_spec

PROMPTS = [[5, 6, 7], [11, 47], prompt(9)]
LEARN = ForwardBackward(
    command_id=1, rows=[Row([7, 8, 9, 10, 11], [None, *[0.25] * 4]), Row(SENTENCE, [None, *[0.1] * 7])]
)


class Session:
    """A session on an engine that is stepped by hand."""

    def __init__(self, tiny: Driver, directory: Path, run_id: str = "session", **changes: Any) -> None:
        self.tiny, self.run_id = tiny, run_id
        spec = SessionSpec(
            run_id=run_id,
            share_group="tenant",
            workdir=str(directory / run_id),
            base_model="tiny",
            lora=LoraSpec(rank=8),
        )
        tiny.engine.add(StartSession(spec))
        self.settle()

    def put(self, command: RunCommand) -> None:
        self.tiny.engine.add(PutCommand(self.run_id, command))

    def settle(self) -> None:
        while self.tiny.engine.has_work:
            self.tiny.step()

    def do(self, command: RunCommand) -> Any:
        self.put(command)
        self.settle()
        return self.tiny.training[-1]

    def learn(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.do(LEARN)
            self.do(OptimStep(command_id=2, settings=AdamWSettings(learning_rate=2e-2)))

    def publish(self, name: str) -> AdapterRef:
        return ref_of(Path(self.do(SaveAdapter(command_id=3, name=name)).path))


def sample(params: SamplingParams, prompts: list[list[int]] = PROMPTS, **changes: Any) -> Sample:
    return Sample(command_id=7, prompts=prompts, sampling=params, **changes)


def served(tiny: Driver, params: list[SamplingParams], adapter: AdapterRef | None) -> list[Any]:
    answers = tiny.run(*(generate(each, own, adapter=adapter) for each, own in zip(PROMPTS, params, strict=True)))
    return [(answer.tokens, answer.logprobs, answer.finish_reason) for answer in answers]


def told(sampled: Any) -> list[Any]:
    assert isinstance(sampled, Sampled), sampled
    return [(each.token_ids, each.logprobs, each.finish_reason) for each in sampled.sequences]


@pytest.mark.parametrize(
    "params",
    [sampling(max_tokens=12, logprobs=0), sampling(max_tokens=12, temperature=1.0, seed=5, logprobs=2)],
    ids=["greedy", "seeded"],
)
def test_samples_of_a_policy_in_training_are_those_of_the_adapter_published_and_served(
    driver: MakeDriver, tmp_path: Path, params: SamplingParams
) -> None:
    tiny = driver()
    session = Session(tiny, tmp_path)
    before = told(session.do(sample(params)))
    session.learn()
    after = told(session.do(sample(params)))
    seeds = [None if params.seed is None else params.seed + index for index in range(3)]
    own = [SamplingParams(**{**{f: getattr(params, f) for f in params.__struct_fields__}, "seed": s}) for s in seeds]
    assert after == served(tiny, own, session.publish("three")), "tokens, and the bits of their log-probabilities"
    assert before == served(tiny, own, None) == told(session.do(sample(params, base=True)))
    assert after != before, "the policy has learned"
    tiny.check_baseline()
    assert not tiny.engine.loader._offered
    assert len(tiny.engine.pool.resident()) == 1, "only the published version is left in the slots"


def test_a_run_that_waits_for_samples_holds_up_nobody(driver: MakeDriver, tmp_path: Path) -> None:
    alone = driver().tokens(prompt(6), sampling(max_tokens=30))
    tiny = driver()
    session = Session(tiny, tmp_path)
    session.put(sample(sampling(max_tokens=60)))
    tiny.step()
    ours = tiny.engine.scheduler.live()
    assert {(sequence.request.share_group, sequence.request.weight) for sequence in ours} == {("tenant", 1.0)}
    tiny.engine.add(StartTraining(make_spec(tmp_path, n_epochs=1)))
    answer = tiny.add(generate(prompt(6), sampling(max_tokens=30)))
    while not answer.done:
        tiny.step()
    assert answer.tokens == alone
    assert tiny.engine.scheduler.live(), "the samples are longer"
    session.settle()
    kinds = [type(event) for event in tiny.training]
    assert FinishedEvent in kinds
    assert Sampled in kinds
    assert not tiny.engine.has_work
    assert tiny.engine.stats().training_runs == 1


def test_the_pool_may_be_smaller_than_all_the_policies_that_are_sampled(driver: MakeDriver, tmp_path: Path) -> None:
    """Sequences wait for a slot as those of any adapter do."""
    tiny = driver(max_adapters=1)
    sessions = [Session(tiny, tmp_path, f"run-{number}") for number in range(3)]
    for session in sessions:
        session.put(sample(sampling(max_tokens=5)))
    sessions[0].settle()
    assert sorted(event.run_id for event in tiny.training if isinstance(event, Sampled)) == ["run-0", "run-1", "run-2"]
    tiny.check_baseline()
    assert tiny.engine.pool.resident() == ()


@pytest.mark.parametrize("pause", [False, True])
def test_stopping_a_run_ends_what_it_samples(driver: MakeDriver, tmp_path: Path, pause: bool) -> None:
    tiny = driver()
    session = Session(tiny, tmp_path)
    session.put(sample(sampling(max_tokens=100)))
    for _ in range(5):
        tiny.step()
    assert len(tiny.engine.scheduler.live()) == 3
    tiny.engine.add(StopTraining("session", pause=pause))
    assert tiny.engine.scheduler.live() == []
    session.settle()
    assert tiny.training[-1] == StoppedEvent(run_id="session", step=0, paused=pause)
    assert not tiny.answers, "nothing of it reaches a client"
    tiny.check_baseline()
    assert tiny.engine.pool.resident() == ()


def test_a_session_that_was_interrupted_samples_again_what_it_would_have(driver: MakeDriver, tmp_path: Path) -> None:
    params = sampling(max_tokens=20, temperature=1.0, seed=3)
    tiny = driver()
    session = Session(tiny, tmp_path)
    session.learn(2)
    expected = told(session.do(sample(params)))
    session.put(sample(params))
    tiny.step()
    events = tiny.engine.shutdown()
    assert [event.event for event in events if isinstance(event, Training)] == [
        StoppedEvent(run_id="session", step=2, paused=True)
    ]
    assert not any(isinstance(event, Outputs) for event in events)
    again = driver()
    resumed = Session(again, tmp_path)
    assert again.training == [SessionReady(run_id="session", step=2)]
    assert told(resumed.do(sample(params))) == expected


def test_a_prompt_that_cannot_run_refuses_the_command_alone(driver: MakeDriver, tmp_path: Path) -> None:
    tiny = driver(max_model_len=32)
    session = Session(tiny, tmp_path)
    refused = session.do(sample(sampling(max_tokens=5), prompts=[[5], [6] * 40, [7] * 50]))
    assert isinstance(refused, Refused)
    assert refused.code == "context_length_exceeded"
    assert isinstance(session.do(sample(sampling(max_tokens=5))), Sampled)
    assert not tiny.answers
    tiny.check_baseline()


def test_a_session_that_waits_lets_the_engine_sleep(driver: MakeDriver, tmp_path: Path) -> None:
    tiny = driver()
    session = Session(tiny, tmp_path)
    assert tiny.engine.stats().training_runs == 1
    assert not tiny.engine.has_work
    session.put(LEARN)
    assert tiny.engine.has_work
