"""What each call sends and reads, and that both clients offer the same."""

from __future__ import annotations

import base64
import inspect
import re
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest

import tenora_client as tc
from tests.client.fake import ADAPTER, BASE_CARDS, COMPLETION, FILE, KEY, Pieces, Script, job, page, reply

MESSAGES = [{"role": "user", "content": "Hello?"}]
RESOURCES = ("chat", "completions", "embeddings", "models", "files", "jobs", "adapters")


def test_chat_sends_what_was_said_and_nothing_else() -> None:
    script = Script(reply(COMPLETION))
    with script.client() as client:
        answer = client.chat.create(MESSAGES, "pubmed", temperature=0.0, stop=["."], extra={"new_field": 1})
    assert answer.text == "Hello"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4
    assert script.sent() == {"messages": MESSAGES, "model": "pubmed", "temperature": 0.0, "stop": ["."], "new_field": 1}
    request = script.requests[0]
    assert (request.method, request.url.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert "idempotency-key" not in request.headers


def test_completions_take_token_ids() -> None:
    body = {"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}
    script = Script(reply(body))
    with script.client() as client:
        assert client.completions.create([1, 2], max_tokens=1, logprobs=2).text == "x"
    assert script.sent() == {"prompt": [1, 2], "max_tokens": 1, "logprobs": 2}


def test_texts_are_read_with_numbers_sent_as_bytes() -> None:
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    sent = base64.b64encode(struct.pack("<2f", 0.6, 0.8)).decode()
    vectors = {"model": "m", "data": [{"index": 0, "object": "embedding", "embedding": sent}], "usage": usage}
    states = {"model": "m", "head": None, "data": [{"index": 0, "object": "pooling", "data": sent}], "usage": usage}
    classes = {
        "model": "m",
        "head": "mood",
        "labels": ["good", "bad"],
        "multi_label": False,
        "data": [{"index": 0, "label": "bad", "probs": [0.25, 0.75], "num_classes": 2}],
        "usage": usage,
    }
    scores = {"model": "m", "head": "r", "data": [{"index": 0, "score": 2.0, "normalized": 1.0}], "usage": usage}
    script = Script(reply(vectors), reply(states), reply(classes), reply(scores))
    with script.client() as client:
        assert client.embeddings.create(["a"], "m", dimensions=2).data[0].embedding == pytest.approx((0.6, 0.8))
        assert client.pool("a", layer=-2, pooling="mean").data[0].data == pytest.approx((0.6, 0.8))
        assert client.classify([[1, 2]], "fox", head="mood").data[0].label == "bad"
        answers: tc.Answers = {"prompt": "Hi", "completions": [" there"]}
        assert client.rewards(answers, "fox").data[0].normalized == 1.0
    assert [request.url.path for request in script.requests] == [
        "/v1/embeddings",
        "/pooling",
        "/classify",
        "/v1/rewards",
    ]
    assert [script.sent(at) for at in range(4)] == [
        {"model": "m", "input": ["a"], "encoding_format": "base64", "dimensions": 2},
        {"input": "a", "encoding_format": "base64", "layer": -2, "pooling": "mean"},
        {"model": "fox", "input": [[1, 2]], "head": "mood"},
        {"model": "fox", "input": {"prompt": "Hi", "completions": [" there"]}},
    ]


def test_names_are_one_path_segment_whatever_they_hold() -> None:
    script = Script(reply(ADAPTER), reply({"id": "x", "object": "model", "deleted": True}), reply(ADAPTER))
    with script.client() as client:
        client.adapters.get("acme/pubmed")
        client.models.delete("ft:base:acme:x:1?#/..")
        client.adapters.get("..")
    raw = [request.url.raw_path.decode() for request in script.requests]
    assert raw == [
        "/v1/adapters/acme%2Fpubmed",
        "/v1/models/ft%3Abase%3Aacme%3Ax%3A1%3F%23%2F..",
        "/v1/adapters/%2E%2E",
    ]


def test_listings_fetch_pages_as_they_are_read() -> None:
    def numbered(number: int) -> dict[str, object]:
        return {**FILE, "id": f"file-{number}"}

    script = Script(reply(page(numbered(1), numbered(2), has_more=True)), reply(page(numbered(3))))
    with script.client() as client:
        files = iter(client.files.list(purpose="fine-tune", limit=2))
        assert [next(files).id, next(files).id] == ["file-1", "file-2"]
        assert len(script.requests) == 1
        assert [file.id for file in files] == ["file-3"]
    assert dict(script.requests[1].url.params) == {"after": "file-2", "limit": "2", "purpose": "fine-tune"}


def test_an_empty_page_ends_a_listing_even_if_it_promises_more() -> None:
    script = Script(reply(page(has_more=True)))
    with script.client() as client:
        assert list(client.jobs.list(metadata={"team": "a"})) == []
    assert dict(script.requests[0].url.params) == {"metadata[team]": "a"}


def test_a_job_is_created_on_the_servers_base() -> None:
    script = Script(reply(BASE_CARDS), reply(job()))
    with script.client() as client:
        created = client.jobs.create(
            tc.File.model_validate(FILE),
            validation_file="file-2",
            name="pubmed",
            lora={"rank": 8},
            hyperparameters={"n_epochs": 2},
        )
    assert created.status == "queued"
    assert script.sent() == {
        "model": "smollm2-135m",
        "training_file": "file-1",
        "validation_file": "file-2",
        "name": "pubmed",
        "lora": {"rank": 8},
        "hyperparameters": {"n_epochs": 2},
    }
    assert len(script.requests[1].headers["idempotency-key"]) == 32


PREVIEW = {
    "object": "file.preview",
    "file_id": "file-1",
    "format": "text",
    "data": [
        {
            "line": 3,
            "part": None,
            "tokens": 2,
            "trained_tokens": 1,
            "truncated": False,
            "truncated_tokens": 0,
            "spans": [{"text": "a", "trained": False}, {"text": "b", "trained": True}],
            "issues": [],
        }
    ],
    "totals": {"rows": 1, "tokens": 2, "trained_tokens": 1, "truncated": 0, "unusable": 0},
    "has_more": True,
    "last_line": 3,
}
ESTIMATE = {
    "object": "fine_tuning.estimate",
    "rows": 9,
    "held_out_rows": 1,
    "tokens": 90,
    "trained_tokens": 30,
    "truncated": 0,
    "n_epochs": "auto",
    "batch_size": 4,
    "steps": 9,
    "read_tokens": 240,
    "tokens_per_second": None,
    "seconds": None,
    "measured": False,
}


def test_a_preview_sends_what_was_given_and_is_retried_like_a_read() -> None:
    script = Script(httpx.ReadError("cut"), reply(PREVIEW), reply(PREVIEW))
    with script.client() as client:
        found = client.files.preview("file-1", limit=1, after=2, truncate=True)
        client.files.preview("file-1")
    assert [(span.text, span.trained) for span in found.data[0].spans] == [("a", False), ("b", True)]
    assert (found.last_line, found.totals.tokens) == (3, 2)
    assert [request.url.path for request in script.requests] == ["/v1/files/file-1/preview"] * 3
    assert script.sent(1) == {"limit": 1, "after": 2, "truncate": True}
    assert script.sent(2) == {}


async def test_an_estimate_sends_what_a_job_would() -> None:
    script = Script(reply(BASE_CARDS), reply(ESTIMATE), reply(ESTIMATE))
    with script.client() as client:
        found = client.jobs.estimate("file-1", n_epochs=3, lora={"rank": 4})
    assert (found.rows, found.n_epochs, found.seconds) == (9, "auto", None)
    body = {"model": "smollm2-135m", "training_file": "file-1", "n_epochs": 3, "lora": {"rank": 4}}
    assert (script.requests[1].url.path, script.sent(1)) == ("/v1/fine_tuning/estimate", body)
    assert "idempotency-key" not in script.requests[1].headers
    async with script.async_client() as other:
        assert (await other.jobs.estimate(model="m", training_files=[{"file": "a"}])).steps == 9
    assert script.sent() == {"model": "m", "training_files": [{"file": "a"}]}


def test_a_job_says_what_its_owner_asked_for() -> None:
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "later": 1}}}
    trial = {"trial": 0, "rank": 8, "status": "finished", "winner": True, "valid_loss": None}
    told = {"method": method, "sweep": {"rank": [8, 16]}, "sweep_results": [trial], "lora": {"rank": 8}}
    answer = job(**told, parent="mine", result_files=["file-9"])
    script = Script(reply(answer))
    files = [{"file": "file-1", "weight": 2}, {"file": "file-2"}]
    asked: dict[str, Any] = {
        "training_files": files,
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        "lora": {"init_from": "mine"},
        "n_epochs": "auto",
        "learning_rate": 1e-3,
        "early_stopping": True,
        "packing": False,
        "sweep": {"rank": [8, 16]},
    }
    with script.client() as client:
        created = client.jobs.create(model="mine", **asked)
    assert script.sent() == {"model": "mine", **asked}
    assert (created.parent, created.lora.rank, created.result_files) == ("mine", 8, ["file-9"])
    assert created.hyperparameters.n_epochs == "auto"
    assert created.method is not None
    assert created.method.dpo is not None
    assert created.method.dpo.hyperparameters is not None
    assert (created.method.supervised, created.method.dpo.hyperparameters.beta) == (None, 0.2)
    assert created.sweep_results is not None
    assert [(one.rank, one.winner, one.valid_loss, one.reason) for one in created.sweep_results] == [
        (8, True, None, None)
    ]
    dumped = created.model_dump(mode="json")
    assert {name: dumped[name] for name in told} == told, "a part is dumped as it came"


def test_an_upload_streams_the_file_and_reports_progress(tmp_path: Path) -> None:
    content = b"x" * 200_000
    source = tmp_path / "train.jsonl"
    source.write_bytes(content)
    seen: list[tuple[int, int]] = []
    script = Script(reply(FILE))
    with script.client() as client:
        client.files.upload(source, expires_after=3600, progress=lambda done, total: seen.append((done, total)))
    request, body = script.requests[0], script.bodies[0]
    assert content in body
    assert b'name="purpose"\r\n\r\nfine-tune' in body
    assert b'name="expires_after[seconds]"\r\n\r\n3600' in body
    assert b'filename="train.jsonl"' in body
    assert int(request.headers["content-length"]) == len(body)
    assert request.headers["idempotency-key"]
    assert len(seen) > 2
    assert seen[-1] == (len(content), len(content))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_retried_upload_sends_the_whole_file_again_under_the_same_key(tmp_path: Path) -> None:
    source = tmp_path / "train.jsonl"
    source.write_bytes(b"content-of-the-file")
    script = Script(reply({}, 503), reply(FILE))
    with script.client() as client:
        client.files.upload(source)
    assert all(b"content-of-the-file" in body for body in script.bodies)
    assert len({request.headers["idempotency-key"] for request in script.requests}) == 1


async def test_the_async_client_uploads_adapters(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    script = Script(reply(ADAPTER, 201))
    async with script.async_client() as client:
        adapter = await client.adapters.import_("pubmed", tmp_path)
    assert adapter.rank == 16
    for part in (
        b'name="adapter_config"; filename="adapter_config.json"',
        b'name="adapter_model"',
        b"weights",
        b"pubmed",
    ):
        assert part in script.bodies[0]


def test_a_missing_local_file_is_pythons_own_error(tmp_path: Path) -> None:
    script = Script()
    with script.client() as client, pytest.raises(FileNotFoundError):
        client.files.upload(tmp_path / "absent.jsonl")


def test_a_download_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "pubmed.zip"
    script = Script(
        httpx.Response(200, stream=Pieces(b"abc", httpx.ReadError("cut"))),
        httpx.Response(200, stream=Pieces(b"abc", b"def")),
    )
    with script.client() as client:
        with pytest.raises(tc.TransportError):
            client.adapters.download("pubmed", target)
        assert list(tmp_path.iterdir()) == []
        assert client.adapters.download("pubmed", target) == target
    assert target.read_bytes() == b"abcdef"
    assert list(tmp_path.iterdir()) == [target]


def test_pin_and_unpin_and_rollback() -> None:
    script = Script(reply(ADAPTER), reply(ADAPTER), reply(ADAPTER))
    with script.client() as client:
        client.adapters.pin("pubmed")
        client.adapters.pin("pubmed", pinned=False)
        client.adapters.rollback("pubmed", 2)
    assert [request.url.path.rpartition("/")[2] for request in script.requests] == ["pin", "unpin", "rollback"]
    assert script.sent() == {"version": 2}


def test_readiness_is_false_without_a_server() -> None:
    script = Script(httpx.ConnectError("refused"), reply({}, 503), reply({}))
    with script.client() as client:
        assert [client.ready(), client.ready(), client.ready()] == [False, False, True]


@pytest.mark.parametrize("resource", RESOURCES)
def test_both_clients_offer_the_same(resource: str) -> None:
    with Script().client() as client:
        ours, theirs = type(getattr(client, resource)), type(getattr(Script().async_client(), resource))
    for left, right in ((ours, theirs), (tc.Job, tc.AsyncJob), (tc.Client, tc.AsyncClient)):
        names = [name for name, _ in inspect.getmembers(left, inspect.isfunction) if not name.startswith("_")]
        assert names == [name for name, _ in inspect.getmembers(right, inspect.isfunction) if not name.startswith("_")]
        for name in names:
            shape = [
                [(p.name, p.kind, p.default) for p in inspect.signature(getattr(cls, name)).parameters.values()]
                for cls in (left, right)
            ]
            assert shape[0] == shape[1], name


async def test_async_calls_read_the_same_objects() -> None:
    script = Script(reply(COMPLETION), reply(page({**FILE})), reply(BASE_CARDS), reply(job("running")))
    async with script.async_client() as client:
        assert (await client.chat.create(MESSAGES)).text == "Hello"
        assert [file.id async for file in client.files.list()] == ["file-1"]
        assert (await client.models.base()).id == "smollm2-135m"
        assert (await client.jobs.get("ftjob-1")).status == "running"


def test_fields_of_a_newer_server_are_kept() -> None:
    script = Script(reply({**FILE, "shiny": 1}))
    with script.client() as client:
        assert client.files.get("file-1").model_extra is not None
        assert script.requests


def test_the_version_is_the_distributions() -> None:
    assert tc.__version__ == metadata.version("tenora-client")


def test_importing_the_client_brings_no_service_and_no_torch() -> None:
    code = "import sys, tenora_client; sys.exit(any(m in sys.modules for m in ('torch', 'tenora', 'numpy', 'fastapi')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_names_what_exists() -> None:
    readme = (Path(__file__).parents[2] / "clients/python/README.md").read_text()
    with Script().client() as client:
        for resource, method in re.findall(r"client\.(\w+)\.(\w+)\(", readme):
            assert callable(getattr(getattr(client, resource), method)), (resource, method)
