"""kill -9 of every process at the worst moments: after a restart nothing is half-written and nothing is lost."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import tenora_client as tc
from tests.e2e.conftest import StartServer
from tests.e2e.material import ask, write_adapter, write_rows
from tests.e2e.serving import Server, until

CANARY = b"canary-of-a-half-written-file"


def trained_steps(client: tc.Client, job_id: str) -> int:
    """The last optimizer step that the job has reported."""
    steps = [event.data["step"] for event in client.jobs.events(job_id) if event.data and "step" in event.data]
    return int(max(steps, default=0))


def everything_listed_answers(client: tc.Client) -> set[str]:
    """Ask every model in the list; their names."""
    names = {model.id for model in client.models.list()}
    for name in names:
        assert client.chat.create(ask("Question 1?"), name, max_tokens=2, ignore_eos=True).model == name
    for adapter in client.adapters.list():
        assert adapter.name in names
        for version in client.adapters.versions(adapter.name):
            assert client.chat.create(ask("Question 1?"), f"{adapter.name}@{version.digest[:12]}", max_tokens=1).choices
    return names


def files_with(home: Path, text: bytes) -> list[Path]:
    """Files of the state directory that hold `text`; the log is not state."""
    return [
        path for path in home.rglob("*") if path.is_file() and path.name != "server.log" and text in path.read_bytes()
    ]


def half_an_upload(server: Server) -> socket.socket:
    """A connection over which a file of 8 MiB has been sent half-way; keep it open."""
    address = urlsplit(server.url)
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="half.jsonl"\r\n\r\n' + CANARY * 60_000
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {server.key()}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {2 * len(body)}\r\n\r\n"
    )
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.full
def test_killed_in_an_upload(new_server: StartServer) -> None:
    server = new_server()
    server.start()
    with half_an_upload(server):
        until(lambda: bool(files_with(server.home, CANARY)), "the first half of the upload is on the disk")
        server.kill()
    server.start()
    with server.client() as client:
        assert list(client.files.list()) == []
    assert files_with(server.home, CANARY) == []


@pytest.mark.full
@pytest.mark.parametrize("point", ["files.before_rename", "files.after_rename"])
def test_killed_when_an_upload_is_complete(new_server: StartServer, tmp_path: Path, point: str) -> None:
    server = new_server()
    source = write_rows(tmp_path / "rows.jsonl", 4, reply=CANARY.decode() + " {}")
    server.start(TENORA_FAILPOINTS=f"{point}=kill")
    with server.client() as client, pytest.raises(tc.TransportError):
        client.files.upload(source, idempotency_key="the-upload")
    server.exit_status()
    server.start()
    with server.client() as client:
        assert list(client.files.list()) == []
        assert files_with(server.home, CANARY) == []
        file = client.files.upload(source, idempotency_key="the-upload")  # the same call again, now for good
        assert client.files.content(file.id) == source.read_bytes()
        assert [one.id for one in client.files.list()] == [file.id]


@pytest.mark.full
def test_killed_in_a_job(new_server: StartServer, tmp_path: Path) -> None:
    server = new_server()
    server.start()
    with server.client() as client:
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 64))
        job = client.jobs.create(file, name="phoenix", hyperparameters={"n_epochs": 20, "batch_size": 4})
        until(lambda: trained_steps(client, job.id) >= 20 or client.jobs.get(job.id).finished, "twenty steps are done")
        assert client.jobs.get(job.id).status == "running"
        before = trained_steps(client, job.id)
    server.kill()

    server.start()
    with server.client() as client:
        done = client.jobs.wait(job.id, poll=0.2)
        assert done.fine_tuned_model is not None
        assert [version.version for version in client.adapters.versions("phoenix")] == [1]
        events = list(client.jobs.events(job.id))
        assert sum("step" in (event.data or {}) for event in events) >= before
        assert any("resum" in event.message.lower() for event in events), [event.message for event in events[-20:]]
        assert {"phoenix", done.fine_tuned_model} & everything_listed_answers(client)
        assert client.chat.create(ask("Question 1?"), done.fine_tuned_model, max_tokens=1).choices


@pytest.mark.full
@pytest.mark.parametrize(
    "point",
    [
        "jobs.after_prepare",
        "publish.before_blob",
        "publish.after_blob",
        "publish.before_commit",
        "publish.after_commit",
    ],
)
def test_killed_at_a_publish(new_server: StartServer, tmp_path: Path, tiny_base: Path, point: str) -> None:
    server = new_server()
    server.start(TENORA_FAILPOINTS=f"{point}=kill")
    with server.client() as client:
        client.adapters.import_("desk", write_adapter(tmp_path / "old", tiny_base, seed=1))
        old = client.adapters.get("desk").digest
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 16))
        try:
            job_id = client.jobs.create(file, name="desk", hyperparameters={"n_epochs": 1}, publish="always").id
        except tc.TransportError:
            job_id = ""  # killed before the answer left; the job is in the list
        until(lambda: "killed by signal 9" in server.log.read_text(), "the worker has died at this point")
        assert server.ready(), "the service goes on without it"
        everything_listed_answers(client)
    server.kill()

    server.start()
    with server.client() as client:
        (listed,) = client.jobs.list()
        assert job_id in {"", listed.id}
        done = listed.wait(poll=0.2)
        # Published once, on top of the version that was there.
        assert [version.version for version in client.adapters.versions("desk")] in ([1, 2], [2, 1])
        adapter = client.adapters.get("desk")
        assert (adapter.version, adapter.job_id) == (2, done.id)
        assert adapter.digest != old
        everything_listed_answers(client)
        client.adapters.rollback("desk", 1)
        assert client.adapters.get("desk").digest == old


@pytest.mark.full
def test_killed_at_an_import(new_server: StartServer, tmp_path: Path, tiny_base: Path) -> None:
    server = new_server()
    directory = write_adapter(tmp_path / "adapter", tiny_base, seed=3)
    server.start(TENORA_FAILPOINTS="adapters.after_blob=kill")
    with server.client() as client, pytest.raises(tc.TransportError):
        client.adapters.import_("desk", directory)
    server.exit_status()
    server.start()
    with server.client() as client:
        assert list(client.adapters.list()) == []
        assert len(everything_listed_answers(client)) == 1
        client.adapters.import_("desk", directory)
        assert "desk" in everything_listed_answers(client)


@pytest.mark.full
def test_killed_engine(new_server: StartServer, long_base: Path, tmp_path: Path) -> None:
    """The engine alone dies: what is open ends with an error and not a hang, and a new engine goes on."""
    server = new_server(long_base)
    server.start()
    directory = write_adapter(tmp_path / "adapter", long_base, seed=5)
    with server.client() as client, server.client() as other:
        client.adapters.import_("desk", directory)
        said = client.chat.create(ask("Question 1?"), "desk", temperature=0.0, max_tokens=16, ignore_eos=True).text
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 64))
        job = client.jobs.create(file, name="phoenix", hyperparameters={"n_epochs": 10, "batch_size": 4})
        until(lambda: trained_steps(client, job.id) >= 5, "five steps are done")
        first = server.engine()
        stream = other.chat.create(ask("Question 1?"), "desk", stream=True, max_tokens=3000, ignore_eos=True)
        assert next(stream) is not None

        first.kill()
        with pytest.raises((tc.StreamError, tc.TransportError)) as broken:
            list(stream)
        assert isinstance(broken.value, tc.StreamError), (
            broken.value
        )  # an event says it, the connection does not just break
        assert server.probe("/livez") in {200, 503}
        until(server.ready, "the engine is there again")
        assert server.engine().pid != first.pid
        again = client.chat.create(ask("Question 1?"), "desk", temperature=0.0, max_tokens=16, ignore_eos=True).text
        assert again == said
        assert client.jobs.wait(job.id, poll=0.2).status == "succeeded"


@pytest.mark.full
def test_while_the_engine_is_away_requests_are_refused_with_a_time_to_come_back(new_server: StartServer) -> None:
    server = new_server()
    server.start()
    with server.client() as client, server.raw() as raw:
        base = client.models.base().id
        server.engine().kill()
        until(lambda: server.probe("/readyz") == 503, "the service sees that its engine is gone")
        answer = raw.post("/v1/chat/completions", json={"model": base, "messages": ask("Hello"), "max_tokens": 1})
        assert isinstance(answer, httpx.Response)
        assert answer.status_code == 503, answer.text
        assert float(answer.headers["retry-after"]) > 0
        until(server.ready, "the engine is there again")
        assert client.chat.create(ask("Hello"), base, max_tokens=1).choices
