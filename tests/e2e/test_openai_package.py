"""The unmodified `openai` package, from a file to an adapter that answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.e2e.material import ask, write_rows
from tests.e2e.serving import Server
from tests.support.patience import PATIENCE

ROWS = 56


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key(), max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def base(client: openai.OpenAI) -> str:
    """The base's id: the card without a parent."""
    return next(card.id for card in client.models.list() if (card.model_extra or {}).get("parent") is None)


@pytest.fixture(scope="module")
def finished(client: openai.OpenAI, base: str, tmp_path_factory: pytest.TempPathFactory) -> FineTuningJob:
    """A job that has succeeded, created with nothing but what the SDK offers and two fields of our own."""
    source = write_rows(tmp_path_factory.mktemp("sdk") / "rows.jsonl", ROWS)
    with source.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    assert (file.status, file.filename, file.bytes) == ("processed", "rows.jsonl", source.stat().st_size)
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        suffix="sdk",
        hyperparameters={"n_epochs": 2, "batch_size": 8},
        metadata={"team": "sdk"},
        extra_body={"name": "sdk-adapter", "lora": {"rank": 4}},
    )
    assert job.object == "fine_tuning.job"
    deadline = time.monotonic() + PATIENCE
    while job.status not in {"succeeded", "failed", "cancelled"}:
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job


def test_a_job_reports_itself(client: openai.OpenAI, base: str, finished: FineTuningJob) -> None:
    assert finished.model == base
    assert finished.fine_tuned_model is not None
    assert finished.fine_tuned_model.startswith(f"ft:{base}:default:sdk:")
    assert finished.trained_tokens is not None
    assert finished.trained_tokens > 0
    assert finished.finished_at is not None
    assert finished.error is None
    assert finished.hyperparameters.n_epochs == 2
    assert finished.metadata == {"team": "sdk"}
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "sdk"})] == [finished.id]
    assert finished.result_files
    assert b"train_loss" in client.files.content(finished.result_files[0]).content


def test_events_page_newest_first_and_carry_metrics(client: openai.OpenAI, finished: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(finished.id, limit=2))  # several pages
    assert len(events) > 4
    assert len({event.id for event in events}) == len(events)
    times = [event.created_at for event in events]
    assert times == sorted(times, reverse=True)
    metrics = [event.data for event in events if event.type == "metrics"]
    assert all(isinstance(data, dict) for data in metrics)
    assert any("train_loss" in data for data in metrics if isinstance(data, dict))
    assert any("valid_loss" in data for data in metrics if isinstance(data, dict))


def test_checkpoints_are_listed_and_answer(client: openai.OpenAI, finished: FineTuningJob) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(finished.id))
    assert checkpoints
    name = checkpoints[0].fine_tuned_model_checkpoint
    assert client.chat.completions.create(model=name, messages=ask("Question 1?"), max_tokens=2).model == name


@pytest.mark.parametrize("kind", ["alias", "canonical", "result"])
def test_the_new_model_answers_by_each_of_its_names(client: openai.OpenAI, finished: FineTuningJob, kind: str) -> None:
    name = {"alias": "sdk-adapter", "canonical": "default/sdk-adapter", "result": finished.fine_tuned_model}[kind]
    assert name is not None
    answer = client.chat.completions.create(model=name, messages=ask("Question 1?"), temperature=0, max_tokens=8)
    assert answer.model == name
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert client.models.retrieve(name).id == name


def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI, finished: FineTuningJob) -> None:
    settings = {"model": "sdk-adapter", "messages": ask("Question 2?"), "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or (
        chunks[-1].usage and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    )


def test_the_adapter_says_something_else_than_the_base(
    client: openai.OpenAI, base: str, finished: FineTuningJob
) -> None:
    said = {
        name: client.chat.completions.create(
            model=name, messages=ask("Question 3?"), max_tokens=1, temperature=0, logprobs=True, top_logprobs=5
        )
        .choices[0]
        .logprobs
        for name in (base, "sdk-adapter")
    }
    assert said[base] != said["sdk-adapter"]


def test_embeddings(client: openai.OpenAI, base: str) -> None:
    """Unless told otherwise the SDK asks for base64."""
    texts = ["Question 1?", "Question 1?", "Something else."]
    coded = client.embeddings.create(model=base, input=texts)
    plain = client.embeddings.create(model=base, input=texts, encoding_format="float")
    vectors = [item.embedding for item in coded.data]
    assert vectors == [pytest.approx(item.embedding) for item in plain.data]
    assert vectors[0] == pytest.approx(vectors[1])
    assert sum(number**2 for number in vectors[0]) == pytest.approx(1)
    assert sum(a * b for a, b in zip(vectors[0], vectors[2], strict=True)) < 0.999
    assert coded.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="has no heads"):
        client.embeddings.create(model=base, input="a", extra_body={"head": "x"})


def test_completions(client: openai.OpenAI, finished: FineTuningJob) -> None:
    settings = {"model": "sdk-adapter", "prompt": "Question", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**settings, logprobs=1)
    streamed = client.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    assert whole.choices[0].logprobs is not None
    two = client.completions.create(**{**settings, "prompt": ["Question", "Question"]})
    assert [choice.text for choice in two.choices] == [whole.choices[0].text] * 2


def test_files_page_and_go(client: openai.OpenAI, tmp_path: Path) -> None:
    made = set()
    for number in range(3):
        source = write_rows(tmp_path / f"page-{number}.jsonl", 2)
        made.add(client.files.create(file=source, purpose="fine-tune").id)
    assert made <= {file.id for file in client.files.list(limit=1)}
    for file_id in made:
        assert client.files.content(file_id).content.count(b"\n") == 2
        assert client.files.delete(file_id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file_id)


def test_bad_rows_are_named_by_line(client: openai.OpenAI, base: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "bad.jsonl", 3)
    source.write_text(source.read_text() + '{"messages": 7}\n')
    file = client.files.create(file=source, purpose="fine-tune")
    assert file.status == "error"
    assert "4" in (file.status_details or "")
    with pytest.raises(openai.BadRequestError) as raised:
        client.fine_tuning.jobs.create(model=base, training_file=file.id)
    assert raised.value.param == "training_file"


def test_typed_errors(client: openai.OpenAI, server: Server, base: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=ask("Hello"))
    assert (missing.value.code, missing.value.param, missing.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert missing.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve("ftjob-nothing")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=base, messages=ask("Hello"), extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=base, messages=ask("Hello"), temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=base, messages=ask("word " * 2000))
    assert long.value.code == "context_length_exceeded"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="nobody", messages=ask("Hello"), stream=True)


def test_the_base_cannot_be_deleted(client: openai.OpenAI, base: str) -> None:
    with pytest.raises((openai.PermissionDeniedError, openai.ConflictError, openai.BadRequestError)):
        client.models.delete(base)
    assert client.models.retrieve(base).id == base


def test_a_deleted_model_is_gone(client: openai.OpenAI, base: str, finished: FineTuningJob, tmp_path: Path) -> None:
    """Last: it deletes what the others used."""
    assert "sdk-adapter" in {card.id for card in client.models.list()}
    assert client.models.delete("sdk-adapter").deleted
    assert "sdk-adapter" not in {card.id for card in client.models.list()}
    for name in ("sdk-adapter", finished.fine_tuned_model):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=name or "", messages=ask("Hello"))
