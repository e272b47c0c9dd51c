"""The unmodified `openai` package against the application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import openai
import pytest

from tests.api.conftest import TRAINING_ROWS, Service, import_adapter


@pytest.fixture
async def sdk(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(service.app)
    http = httpx2.AsyncClient(transport=transport, base_url="http://tenora.test")
    client = openai.AsyncOpenAI(
        api_key=service.keys["default"]["admin"], base_url="http://tenora.test/v1", http_client=http, max_retries=0
    )
    yield client
    await client.close()


async def test_chat(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    messages = [{"role": "user", "content": "Say it."}]
    answer = await sdk.chat.completions.create(model=base_id, messages=messages, max_tokens=4, logprobs=True)
    assert answer.choices[0].message.content
    assert answer.choices[0].logprobs.content[0].token == "The"
    # An answer goes back into the conversation as it came.
    messages.append(answer.choices[0].message.model_dump())
    stream = await sdk.chat.completions.create(
        model=base_id, messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 4


async def test_completions(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    answer = await sdk.completions.create(model=base_id, prompt=["a", "b"], max_tokens=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.token_logprobs) == 2


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
async def test_embeddings(sdk: openai.AsyncOpenAI, base_id: str, encoding: dict[str, str]) -> None:
    """Unless told the SDK asks for base64 and makes numbers of it."""
    answer = await sdk.embeddings.create(model=base_id, input=["a", "b"], user="me", dimensions=2, **encoding)
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.object, answer.model, answer.data[0].object) == ("list", base_id, "embedding")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens == 2
    vector = answer.data[0].embedding
    if encoding.get("encoding_format") == "base64":
        assert isinstance(vector, str)
    else:
        assert len(vector) == 2
        assert sum(number * number for number in vector) == pytest.approx(1)


async def test_preview_and_estimate_by_raw_calls(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    file = await sdk.files.create(file=("train.jsonl", TRAINING_ROWS.encode()), purpose="fine-tune")
    preview = await sdk.post(f"/files/{file.id}/preview", body={"limit": 1}, cast_to=object)
    assert [span["trained"] for span in preview["data"][0]["spans"]] == [False, True, False]
    body = {"model": base_id, "training_file": file.id, "n_epochs": 4}
    estimate = await sdk.post("/fine_tuning/estimate", body=body, cast_to=object)
    assert (estimate["rows"], estimate["n_epochs"], estimate["measured"]) == (12, 4, False)
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.post("/fine_tuning/estimate", body={**body, "n_epochs": 99}, cast_to=object)
    assert caught.value.param == "n_epochs"


async def test_files_and_jobs(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    file = await sdk.files.create(file=("train.jsonl", TRAINING_ROWS.encode()), purpose="fine-tune")
    assert file.status == "processed"
    assert [item.id async for item in sdk.files.list()] == [file.id]
    assert (await sdk.files.content(file.id)).text == TRAINING_ROWS
    job = await sdk.fine_tuning.jobs.create(
        model=base_id,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        metadata={"who": "me"},
        extra_body={"name": "fox", "lora": {"rank": 8}},
    )
    assert (job.object, job.hyperparameters.n_epochs) == ("fine_tuning.job", 1)
    assert [item.id async for item in sdk.fine_tuning.jobs.list(limit=1)] == [job.id]
    assert [item.id async for item in sdk.fine_tuning.jobs.list(metadata={"who": "you"})] == []
    assert [event.object async for event in sdk.fine_tuning.jobs.list_events(job.id)]
    assert (await sdk.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    assert [item async for item in sdk.fine_tuning.jobs.checkpoints.list(job.id)] == []
    with pytest.raises(openai.ConflictError):
        await sdk.fine_tuning.jobs.resume(job.id)
    assert (await sdk.files.delete(file.id)).deleted


async def test_models_and_errors(sdk: openai.AsyncOpenAI, service: Service, make_adapter: Callable[..., Path]) -> None:
    await import_adapter(service.client("adapters"), "fox", make_adapter(1))
    assert "fox" in [model.id async for model in sdk.models.list()]
    assert (await sdk.models.retrieve("default/fox")).id == "default/fox"
    assert (await sdk.models.delete("fox")).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.chat.completions.create(model="fox", messages=[{"role": "user", "content": "x"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unknown:
        await sdk.chat.completions.create(
            model="fox", messages=[{"role": "user", "content": "x"}], extra_body={"typo": 1}
        )
    assert unknown.value.param == "typo"
    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="tk-wrong").models.list()


async def test_what_the_sdk_sends_besides_changes_nothing(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    messages = [{"role": "user", "content": "Say it."}]
    plain = await sdk.chat.completions.create(model=base_id, messages=messages, max_tokens=4, seed=1)
    labelled = await sdk.chat.completions.create(
        model=base_id,
        messages=messages,
        max_tokens=4,
        seed=1,
        top_p=0,
        store=False,
        metadata={"team": "desk"},
        parallel_tool_calls=True,
        service_tier="auto",
        modalities=["text"],
        prompt_cache_key="desk",
        safety_identifier="someone",
        verbosity="low",
        stop=None,
        logit_bias=None,
        reasoning_effort=None,
        audio=None,
    )
    assert labelled.choices[0].message.content == plain.choices[0].message.content
    for field, value in (("reasoning_effort", "high"), ("service_tier", "priority"), ("store", True)):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.chat.completions.create(model=base_id, messages=messages, extra_body={field: value})
        assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


async def test_a_job_that_has_not_ended_has_no_model_to_ask(sdk: openai.AsyncOpenAI, base_id: str) -> None:
    file = await sdk.files.create(file=("train.jsonl", TRAINING_ROWS.encode()), purpose="fine-tune")
    job = await sdk.fine_tuning.jobs.create(model=base_id, training_file=file.id)
    assert job.fine_tuned_model is None
    with pytest.raises(openai.BadRequestError, match="fine_tuned_model is null until") as caught:
        await sdk.chat.completions.create(model=job.fine_tuned_model, messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.param == "model"
    await sdk.fine_tuning.jobs.cancel(job.id)
