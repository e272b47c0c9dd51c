"""Fine-tuning through the unmodified `openai` package, from the file to a checkpoint that answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tenora.control.worker import membership
from tenora.training.events import CheckpointEvent, EvalEvent, FinishedEvent, StepEvent, TrainEvent
from tenora.training.spec import TrainSpec
from tests.api.conftest import SPEECH, TRAINING_ROWS, Service, import_adapter
from tests.support.scripted_engine import Script

PAIRS = "".join(
    '{"input": {"messages": [{"role": "user", "content": "Define: fox."}]}, '
    '"preferred_output": [{"role": "assistant", "content": "A quick one."}], '
    '"non_preferred_output": [{"role": "assistant", "content": "No."}]}\n'
    for _ in range(12)
)
SHAPE = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}  # of `make_adapter`


@pytest.fixture
async def sdk(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(service.app)
    http = httpx2.AsyncClient(transport=transport, base_url="http://tenora.test")
    key = service.keys["default"]["admin"]
    client = openai.AsyncOpenAI(api_key=key, base_url="http://tenora.test/v1", http_client=http, max_retries=0)
    yield client
    await client.close()


@pytest.fixture
def trains(script: Script, make_adapter: Callable[..., Path]) -> list[TrainSpec]:
    """Runs end at once, with a checkpoint and a result; the specs that were started."""
    started: list[TrainSpec] = []

    def events(spec: TrainSpec) -> Sequence[TrainEvent]:
        started.append(spec)
        kept: list[str] = []
        for seed in (1, 2):
            directory = Path(spec.workdir) / f"step-{seed}"
            shutil.copytree(make_adapter(seed), directory)
            kept.append(str(directory))
        run: dict[str, Any] = {"run_id": spec.run_id}
        loss: dict[str, Any] = {"valid_loss": 1.0, "valid_accuracy": 0.5}
        train: dict[str, Any] = {"train_loss": 1.0, "train_accuracy": 0.5}
        made: list[TrainEvent] = []
        for step, path in enumerate(kept, 1):
            made += [
                StepEvent(
                    step=step,
                    total_steps=2,
                    epoch=step / 2,
                    learning_rate=1e-3,
                    grad_norm=1.0,
                    trained_tokens=10 * step,
                    tokens_per_second=100.0,
                    **run,
                    **train,
                ),
                EvalEvent(step=step, base_loss=2.0, best=True, **run, **loss),
                CheckpointEvent(step=step, path=path, **run, **train, **loss),
            ]
        end = FinishedEvent(
            path=kept[-1], step=2, steps=2, base_loss=2.0, trained_tokens=20, seconds=1.0, **run, **loss
        )
        return [*made, end]

    script.training = events
    return started


async def finished(sdk: openai.AsyncOpenAI, job_id: str) -> Any:
    job = await sdk.fine_tuning.jobs.retrieve(job_id)
    while job.status not in {"succeeded", "failed", "cancelled"}:
        await asyncio.sleep(0.05)
        job = await sdk.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    return job


async def test_checkpoints_and_results_answer_as_models(
    sdk: openai.AsyncOpenAI, service: Service, script: Script, base_id: str, trains: list[TrainSpec]
) -> None:
    file = await sdk.files.create(file=("train.jsonl", TRAINING_ROWS.encode()), purpose="fine-tune")
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
    made = await sdk.fine_tuning.jobs.create(
        model=base_id, training_file=file.id, method=method, seed=7, suffix="fox", extra_body={"lora": SHAPE}
    )
    job = await finished(sdk, made.id)
    assert (job.seed, job.trained_tokens, job.hyperparameters.n_epochs) == (7, 20, 2)
    assert isinstance(job.method.supervised.hyperparameters.batch_size, int)
    assert job.fine_tuned_model.startswith(f"ft:{base_id}:default:fox:")
    checkpoints = [item async for item in sdk.fine_tuning.jobs.checkpoints.list(job.id)]
    assert [item.step_number for item in checkpoints] == [2, 1]
    assert checkpoints[0].metrics.full_valid_loss == 1.0
    for model in (job.fine_tuned_model, *(item.fine_tuned_model_checkpoint for item in checkpoints)):
        answer = await sdk.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi."}], max_tokens=4
        )
        assert SPEECH.startswith(answer.choices[0].message.content)
        assert answer.model == model
    answered = [request for request in script.requests if request.sampling.max_tokens]  # others score
    adapters = [request.adapter.digest for request in answered if request.adapter]
    assert len(adapters) == 3
    assert len(set(adapters)) == 2  # the last checkpoint is the result
    csv = (await sdk.files.content(job.result_files[0])).text
    assert csv.splitlines()[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    events = [event async for event in sdk.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert {event.type for event in events} == {"message", "metrics"}


async def test_fine_tuning_goes_on_from_a_model_of_ones_own(
    sdk: openai.AsyncOpenAI,
    service: Service,
    base_id: str,
    trains: list[TrainSpec],
    make_adapter: Callable[..., Path],
) -> None:
    await import_adapter(service.client("adapters"), "fox", make_adapter(1))
    await import_adapter(service.client("adapters", "other"), "theirs", make_adapter(2))
    file = await sdk.files.create(file=("train.jsonl", TRAINING_ROWS.encode()), purpose="fine-tune")
    first = await finished(sdk, (await sdk.fine_tuning.jobs.create(model="fox", training_file=file.id)).id)
    assert (first.model, first.parent) == ("fox", "fox")
    again = await sdk.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=file.id)
    second = await finished(sdk, again.id)
    assert second.parent == first.fine_tuned_model
    assert [(spec.lora.rank, bool(spec.init_path)) for spec in trains] == [(4, True)] * 2
    told = set()
    for name in ("theirs", "nobody", "other/theirs"):
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.fine_tuning.jobs.create(model=name, training_file=file.id)
        told.add((missing.value.code, missing.value.param, missing.value.message.replace(name, "?")))
    assert len(told) == 1


async def test_preferences(sdk: openai.AsyncOpenAI, base_id: str, trains: list[TrainSpec]) -> None:
    file = await sdk.files.create(file=("pairs.jsonl", PAIRS.encode()), purpose="fine-tune")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto", "n_epochs": 1}}}
    made = await sdk.fine_tuning.jobs.create(
        model=base_id, training_file=file.id, method=method, extra_body={"lora": SHAPE}
    )
    assert made.method.dpo.hyperparameters.beta == "auto"
    job = await finished(sdk, made.id)
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", 0.1)
    assert job.method.supervised is None
    assert (trains[0].method, trains[0].method_settings["beta"]) == ("dpo", 0.1)


async def test_the_fields_of_ones_own_come_back(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    files = [await sdk.files.create(file=(name, TRAINING_ROWS.encode()), purpose="fine-tune") for name in ("a", "b")]
    fields = {"early_stopping": True, "packing": False, "eval_interval": 5, "max_steps": 7, "learning_rate": 1e-3}
    own = {**fields, "sweep": {"rank": [4, 8]}, "training_files": [{"file": one.id} for one in files]}
    job = await sdk.fine_tuning.jobs.create(model=base_id, training_file=openai.omit, extra_body=own)
    assert job.training_file == files[0].id
    assert [one["file"] for one in job.training_files] == [one.id for one in files]
    assert {name: getattr(job, name) for name in fields} == {**fields, "early_stopping": 3}
    assert job.sweep == {"rank": [4, 8]}
    await sdk.fine_tuning.jobs.cancel(job.id)


async def test_a_file_expires_while_the_service_runs(
    sdk: openai.AsyncOpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = await sdk.files.create(file=("a", TRAINING_ROWS.encode()), purpose="fine-tune")
    file = await sdk.files.create(
        file=("b", TRAINING_ROWS.encode()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    assert kept.expires_at is None
    tenant = await service.control.tenants.get("default")
    path = service.settings.root / "tenants" / tenant.id / "files" / file.id
    assert path.exists()
    later = file.created_at + 3601
    monkeypatch.setattr("tenora.control.files.files.unix_now", lambda: later)
    monkeypatch.setattr(membership, "SWEEP_SECONDS", 0.05)
    keeper = asyncio.create_task(service.control._membership._sweep())
    while path.exists():  # noqa: ASYNC110  # the state of a directory
        await asyncio.sleep(0.02)
    keeper.cancel()
    assert [item.id async for item in sdk.files.list()] == [kept.id]
    with pytest.raises(openai.NotFoundError):
        await sdk.files.retrieve(file.id)
