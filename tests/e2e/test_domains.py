"""The real base, two real domains: each adapter beats the base, and on its own domain the other adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tenora_client as tc
from tests.e2e.material import head_of
from tests.e2e.serving import Server

pytestmark = [pytest.mark.real, pytest.mark.full]
DOMAINS = ("pubmedqa_sft", "devils_dictionary")
TRAIN_ROWS = 64
VALID_ROWS = 10
END_OF_TURN = "<|im_end|>"
Row = dict[str, list[dict[str, str]]]


@dataclass
class Trained:
    """A domain's adapter, and the rows that it has not seen."""

    name: str
    job: tc.Job
    held_out: list[Row]


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory, real_base: Path, shared_data: Path) -> Iterator[Server]:
    """A server of the real base; every core trains."""
    served = Server(tmp_path_factory.mktemp("real"), real_base)
    served.settings.pop("TENORA_THREADS")
    try:
        served.start()
        yield served
    finally:
        served.stop()


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[tc.Client]:
    with real_server.client() as client:
        yield client


@pytest.fixture(scope="module")
def trained(client: tc.Client, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """One default job per domain, one epoch of it to fit a test's time."""
    directory, jobs = tmp_path_factory.mktemp("domains"), {}
    for domain in DOMAINS:
        rows = head_of(shared_data / f"{domain}_train.jsonl", directory / f"{domain}.jsonl", TRAIN_ROWS)
        valid = head_of(shared_data / f"{domain}_valid.jsonl", directory / f"{domain}_valid.jsonl", VALID_ROWS)
        name = domain.replace("_", "-")
        job = client.jobs.create(
            client.files.upload(rows),
            validation_file=client.files.upload(valid),
            name=name,
            hyperparameters={"n_epochs": 1, "batch_size": 4},
        )
        held_out = [json.loads(line) for line in valid.read_text(encoding="utf-8").splitlines()]
        jobs[domain] = Trained(name, job.wait(poll=0.5), held_out)
    return jobs


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_job_lowers_the_held_out_loss_well_below_the_bases(trained: dict[str, Trained], domain: str) -> None:
    evaluation = trained[domain].job.evaluation
    assert evaluation is not None
    assert evaluation.valid_loss is not None
    assert evaluation.base_loss is not None
    assert evaluation.valid_loss < evaluation.base_loss - 0.15


def answer_losses(client: tc.Client, models: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Nats per token of the rows' answers, their end-of-turn token included, under each model, as served."""
    losses: dict[str, list[float]] = {model: [] for model in models}
    for row in rows:
        usage = client.chat.create(row["messages"][:-1], models[0], max_tokens=1).usage
        assert usage is not None
        for model in models:
            # Where the answer begins is where the prompt for it ends.
            losses[model] += [-entry["logprob"] for entry in logprobs(client, model, row)[usage.prompt_tokens :]]
    return {model: sum(found) / len(found) for model, found in losses.items()}


def logprobs(client: tc.Client, model: str, row: Row) -> list[dict[str, Any]]:
    """Each token of a conversation up to the end of its last turn, with its log-probability; the first has none."""
    completion = client.chat.create(row["messages"], model, max_tokens=1, prompt_logprobs=0)
    found = (completion.model_extra or {})["prompt_logprobs"]
    tokens = [next(iter(entry.values())) if entry else {"decoded_token": "", "logprob": 0.0} for entry in found]
    last = max(index for index, token in enumerate(tokens) if token["decoded_token"] == END_OF_TURN)
    return tokens[: last + 1]


def test_each_adapter_is_better_on_its_own_domain(client: tc.Client, trained: dict[str, Trained]) -> None:
    base = client.models.base().id
    names = {domain: trained[domain].name for domain in DOMAINS}
    for domain in DOMAINS:
        loss = answer_losses(client, [base, *names.values()], trained[domain].held_out)
        other = next(name for key, name in names.items() if key != domain)
        assert loss[names[domain]] < loss[base] - 0.15, loss
        assert loss[names[domain]] < loss[other] - 0.05, loss
        # The job's own evaluation and the serving path agree: the parity of training and serving.
        evaluation = trained[domain].job.evaluation
        assert evaluation is not None
        assert loss[names[domain]] == pytest.approx(evaluation.valid_loss, abs=0.01)
        assert loss[base] == pytest.approx(evaluation.base_loss, abs=0.01)
