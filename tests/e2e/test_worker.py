"""The worker is a process of its own: what its death, its service's death and a signal leave behind."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

import tenora_client as tc
from tenora.cli.working import NICE
from tests.e2e.conftest import StartServer
from tests.e2e.material import ask, write_rows
from tests.e2e.serving import TENORA, Server, alive, until
from tests.e2e.test_crashes import trained_steps
from tests.support.patience import PATIENCE

SECRET = "tk-secret-of-the-operator-0123456789"


def long_job(client: tc.Client, directory: Path, name: str) -> tc.Job:
    """A job of hundreds of steps."""
    file = client.files.upload(write_rows(directory / f"{name}.jsonl", 64))
    return client.jobs.create(
        file, name=name, seed=7, hyperparameters={"n_epochs": 12, "batch_size": 4}, publish="always"
    )


def losses(client: tc.Client, job_id: str) -> dict[int, float]:
    """Training loss of each step, as it was told last."""
    told = reversed(list(client.jobs.events(job_id)))
    return {event.data["step"]: event.data["train_loss"] for event in told if event.data and "train_loss" in event.data}


def at_work(server: Server) -> psutil.Process:
    """The worker, once it says that it works."""
    until(lambda: "the worker is at work" in server.log.read_text(), f"a worker works:\n{server.tail()}")
    return server.worker()


def digest_of(client: tc.Client, name: str) -> str:
    return client.adapters.get(name).digest


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, long_base: Path) -> Iterator[Server]:
    """A server whose worker may come and go, and nothing else."""
    served = Server(tmp_path_factory.mktemp("served"), long_base, TENORA_DTYPE="float32", TENORA_API_KEY=SECRET)
    try:
        served.start()
        yield served
    finally:
        served.stop()


def test_a_killed_worker_ends_no_stream_and_its_job_goes_on_with_the_same_bits(shared: Server, tmp_path: Path) -> None:
    server = shared
    with server.client(SECRET) as client, server.client(SECRET) as other:
        base = client.models.base().id
        whole = long_job(client, tmp_path, "whole")
        assert client.jobs.wait(whole.id, poll=0.2).status == "succeeded"
        job = long_job(client, tmp_path, "broken")
        until(lambda: trained_steps(client, job.id) >= 20, "twenty steps are done")
        worker = server.worker()
        stream = other.chat.create(ask("Question 1?"), base, stream=True, max_tokens=400, ignore_eos=True)
        assert next(stream) is not None
        worker.kill()
        pieces = sum(1 for _ in stream)
        assert pieces >= 1, "the stream came to its own end"
        until(lambda: server.worker().pid != worker.pid, "another worker is there")
        assert client.jobs.wait(job.id, poll=0.2).status == "succeeded"
        assert digest_of(client, "broken") == digest_of(client, "whole")
        assert losses(client, job.id) == losses(client, whole.id)
        told = [event for event in client.jobs.events(job.id) if event.data and "train_loss" in event.data]
        assert len(told) == len(losses(client, job.id)), "no step was made twice: the engine has saved the last one"
        assert client.jobs.get(job.id).status == "succeeded"


@pytest.mark.full
def test_a_worker_outlives_its_service_to_finish_what_it_prepares_and_the_next_one_waits_for_it(
    new_server: StartServer, tmp_path: Path
) -> None:
    server = new_server()
    server.start()
    with server.client() as client:
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 20_000))
        worker = server.worker()
        job = client.jobs.create(file, hyperparameters={"n_epochs": 1, "batch_size": 64})
        until(lambda: is_claimed(server, job.id), "the worker has begun with it")
        worker.suspend()  # so that it is at it still when its service dies
        server.process.kill()
        server.process.wait(PATIENCE)
        worker.resume()
    server.start(TENORA_FAILPOINTS="jobs.after_prepare=error")  # who prepares it again fails it
    with server.client() as client:
        until(lambda: not alive(worker), "the old worker has ended")
        until(lambda: client.jobs.get(job.id).status != "validating_files", "the job goes on")
        assert client.jobs.get(job.id).status in {"queued", "running"}
        assert server.worker().pid != worker.pid
        said = [event.message for event in client.jobs.events(job.id)]
        assert sum("Files validated" in line for line in said) == 1, "it was prepared once"
        client.jobs.cancel(job.id)


def is_claimed(server: Server, job_id: str) -> bool:
    """Whether a worker has the job in its hands, which the registry alone knows while it is prepared."""
    with closing(sqlite3.connect(server.home / "tenora.db", timeout=PATIENCE)) as registry:
        (owner,) = registry.execute("SELECT lease_owner FROM jobs WHERE id = ?", [job_id]).fetchone()
    return owner is not None


def test_a_worker_that_is_told_to_end_saves_its_run_and_ends_in_order(shared: Server, tmp_path: Path) -> None:
    server = shared
    with server.client(SECRET) as client:
        job = long_job(client, tmp_path, "phoenix")
        until(lambda: trained_steps(client, job.id) >= 20, "twenty steps are done")
        worker = server.worker()
        worker.send_signal(signal.SIGTERM)
        until(lambda: not alive(worker), "it has ended")
        until(lambda: "exit status 0" in server.log.read_text(), "its service has seen that")
        assert client.jobs.wait(job.id, poll=0.2).status == "succeeded"


def test_a_server_that_ends_ends_its_worker(new_server: StartServer) -> None:
    server = new_server()
    server.start()
    worker = at_work(server)
    server.terminate()
    assert server.exit_status() == 0
    assert not alive(worker)


def test_a_worker_leaves_the_processor_to_its_service_and_so_does_its_session(shared: Server) -> None:
    worker = at_work(shared)
    assert worker.nice() == min(19, psutil.Process(shared.process.pid).nice() + NICE)
    session = Path(f"/proc/{worker.pid}/autogroup")
    assert not session.exists() or session.read_text().split()[-1] == str(worker.nice())


def test_no_second_worker_works_on_a_state_directory(shared: Server) -> None:
    at_work(shared)
    second = subprocess.run(
        [str(TENORA), "work"], env=shared.environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert second.returncode == 1
    assert "Another worker works" in second.stderr


def test_no_secret_is_in_the_workers_environment(shared: Server) -> None:
    worker = shared.worker()
    assert not [name for name in worker.environ() if name.startswith("TENORA_")]
    assert "tk-secret" not in " ".join(worker.cmdline())


@pytest.mark.full  # in quick: TestTraining of tests/api/test_operations.py
@pytest.mark.parametrize("role", ["serve", "train"])
def test_a_role_means_what_it_says(new_server: StartServer, tmp_path: Path, role: str) -> None:
    server = new_server()
    server.start(TENORA_ROLE=role)
    with server.client() as client, server.raw() as raw:
        base = client.models.base().id
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 16))
        job = client.jobs.create(file, hyperparameters={"n_epochs": 1})
        answer = raw.post("/v1/chat/completions", json={"model": base, "messages": ask("Hello"), "max_tokens": 1})
        assert raw.get("/metrics").status_code == 200
        if role == "train":
            assert answer.status_code == 404
            assert client.jobs.wait(job.id, poll=0.2).status == "succeeded"
            return
        assert answer.status_code == 200
        assert client.jobs.get(job.id).status == "validating_files"
        assert not server._has_child("tenora.cli.working")
        refused = subprocess.run(
            [str(TENORA), "work"],
            env=server.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert "No service that trains" in refused.stderr
