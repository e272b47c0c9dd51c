"""The control plane over the real engine (in a thread) and a tiny base: what the scripted one cannot show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tenora.adapters.table_rows import TableRows
from tenora.config import Settings
from tenora.control.control import Control
from tenora.control.inference.records import Delta, GenerationRequest
from tenora.control.tenancy.records import Principal
from tenora.engine.client.client import AsyncEngine
from tenora.engine.core import Engine
from tenora.engine.messages import SamplingParams
from tenora.model.catalog import ResolvedModel
from tenora.model.tokenizer import Tokenizer
from tests.control.conftest import BASE, ROWS, ImportAdapter, create_job, tenant, until, upload
from tests.support.threads import one_thread


class Service:
    """Engine and control plane on one state directory, to be stopped and started again."""

    def __init__(self, home: Path, base: Path, tokenizer: Tokenizer, base_rows: TableRows) -> None:
        self.settings = Settings(
            home=home,
            device="cpu",
            dtype="float32",
            threads=1,
            kv_cache_bytes=4 * 2**20,
            adapter_pool_bytes=8 * 2**20,
            max_adapters=8,
        )
        self.parts = (tokenizer, ResolvedModel(base, BASE), base_rows)
        self.base = base

    async def start(self) -> Control:
        self.engine = AsyncEngine.in_thread(
            self.settings, lambda wake: Engine.load(self.settings, self.base, wake=wake)
        )
        await self.engine.start()
        self.control = await Control.open(self.settings, self.engine, *self.parts)
        await self.control.start()
        return self.control

    async def stop(self) -> None:
        await self.control.close()
        await self.engine.close(0)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    with one_thread():
        yield


@pytest.fixture
async def service(home: Path, tiny_base: Path, tokenizer: Tokenizer, base_rows: TableRows) -> AsyncIterator[Service]:
    made = Service(home, tiny_base, tokenizer, base_rows)
    await made.start()
    yield made
    await made.stop()


async def say(control: Control, who: Principal, model: str, *, n: int = 1, stop: Sequence[str] = ()) -> list[Delta]:
    inference = control.inference
    request = GenerationRequest(
        target=await inference.resolve(who, model, None),
        prompt_token_ids=inference.prompts.chat([{"role": "user", "content": "Question 1?"}]),
        sampling=SamplingParams(max_tokens=12, temperature=0.0 if n == 1 else 1.0, seed=1, logprobs=1),
        ignore_eos=True,
        n=n,
        stop=stop,
    )
    return [delta async for _, delta in inference.generate([request])]


def text(deltas: Sequence[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def scores(deltas: Sequence[Delta]) -> list[tuple[int, float]]:
    return [(entry.token_id, entry.logprob) for delta in deltas for entry in delta.logprobs or ()]


async def test_a_job_is_trained_served_and_survives(service: Service) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    train, valid = [await upload(control, acme, rows) for rows in (ROWS[:18], ROWS[18:])]
    job = await create_job(
        control,
        acme,
        training_file=train.id,
        validation_file=valid.id,
        name="desk",
        seed=3,
        lora={"rank": 4},
        n_epochs=6,
        batch_size=6,
    )
    await until(control, acme, job.id, "running", messages=["Step 2/18"])
    await service.stop()

    control = await service.start()
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    assert done.evaluation is not None
    assert done.evaluation["valid_loss"] < done.evaluation["base_loss"]
    assert done.evaluation["forgetting"]["tokens"] > 100
    assert done.evaluation["forgetting"]["change"] != 0.0
    said = [event.message for event in (await control.jobs.events(acme, job.id, limit=1000)).items]
    assert "Fine-tuning job resumed from its last saved state" in said
    assert any(line.startswith("Step 18/18") for line in said)
    assert done.fine_tuned_model is not None
    base, ours, again = [scores(await say(control, acme, name)) for name in (BASE, "desk", done.fine_tuned_model)]
    assert ours == again != base
    for checkpoint in (await control.jobs.checkpoints(acme, job.id)).items:
        assert text(await say(control, acme, checkpoint.fine_tuned_model_checkpoint))


async def test_streams_of_the_real_engine(service: Service, import_adapter: ImportAdapter) -> None:
    control = service.control
    acme = await tenant(control, "acme")
    await import_adapter(control, acme, "desk", seed=1)
    whole = await say(control, acme, "desk")
    said = text(whole)
    assert whole[-1].finish_reason == "length"
    assert whole[-1].completion_tokens == 12 == sum(len(delta.logprobs or ()) for delta in whole)
    tokens = [token for delta in whole for token in delta.token_ids]
    assert service.parts[0].decode(tokens) == said
    stop = said[3:5]
    cut = await say(control, acme, "desk", stop=[stop])
    assert text(cut) == said[: said.index(stop)]
    assert (cut[-1].finish_reason, cut[-1].stop_reason) == ("stop", stop)
    several = await say(control, acme, "desk", n=3)
    assert len({text(several, index) for index in range(3)}) > 1
    assert [text(await say(control, acme, "desk", n=3), index) for index in range(3)] == [
        text(several, index) for index in range(3)
    ]


async def test_deleting_frees_the_engine_too(service: Service, import_adapter: ImportAdapter) -> None:
    control = service.control
    acme, umbrella = await tenant(control, "acme"), await tenant(control, "umbrella")
    await import_adapter(control, acme, "desk", seed=1)
    await import_adapter(control, umbrella, "desk", seed=1)
    await say(control, acme, "desk")
    await control.adapters.delete(acme, "desk")
    assert text(await say(control, umbrella, "desk"))
    await control.adapters.delete(umbrella, "desk")
    await import_adapter(control, umbrella, "desk", seed=2)
    assert text(await say(control, umbrella, "desk"))
