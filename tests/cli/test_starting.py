"""The first minutes of `tenora serve`, as a process: what it says, what it claims, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from tenora.cli import serving
from tenora.cli.app import app
from tenora.processes import bound_to_parent

# The same service as the API's tests use.
from tests.api.conftest import Service, script, service, settings  # noqa: F401
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.e2e


@pytest.fixture
def silent_index() -> Iterator[str]:
    """A package index that takes connections and never answers: a download without an end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/simple"
        listener.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Fetching:
    """A server whose base does not come."""

    def __init__(self, home: Path, index: str) -> None:
        self.home, self.port = home, free_port()
        self.environment = {
            **os.environ,
            "TENORA_HOME": str(home),
            "TENORA_MODEL": "smollm2-135m",
            "PIP_INDEX_URL": index,
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_NO_INPUT": "1",
        }
        self.process = self.serve(self.port)
        until(lambda: any("download" in " ".join(child.cmdline()) for child in self.children()))

    def serve(self, port: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tenora", "serve", "--port", str(port)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def children(self) -> list[psutil.Process]:
        try:
            return [child for child in psutil.Process(self.process.pid).children(recursive=True) if child.is_running()]
        except psutil.NoSuchProcess:
            return []

    def left_over(self) -> list[Path]:
        return [path for path in (self.home / "models").iterdir() if path.name.endswith(".partial")]

    def runs(self, word: str) -> bool:
        """Whether a child has that word in its command line."""
        return any(word in child.cmdline() for child in self.children())


@pytest.fixture
def fetching(tmp_path: Path, silent_index: str) -> Iterator[Fetching]:
    with running(tmp_path / "home", silent_index) as server:
        yield server


@contextmanager
def running(home: Path, index: str) -> Iterator[Fetching]:
    server = Fetching(home, index)
    try:
        yield server
    finally:
        children = server.children()
        server.process.kill()
        server.process.communicate()
        psutil.wait_procs(children, timeout=PATIENCE)


def test_while_the_base_downloads_probes_answer_and_a_second_server_is_told_at_once(fetching: Fetching) -> None:
    url = f"http://127.0.0.1:{fetching.port}"
    until(lambda: httpx.get(f"{url}/readyz", timeout=PATIENCE).json().get("phase") == "download")
    answer = httpx.get(f"{url}/readyz", timeout=PATIENCE)
    assert (answer.status_code, answer.json()["message"]) == (503, "downloading the base")
    assert httpx.get(f"{url}/livez", timeout=PATIENCE).status_code == 200
    second = fetching.serve(0)
    _, said = second.communicate(timeout=PATIENCE)
    assert (second.returncode, "Another Tenora serves from" in said) == (1, True)
    fetching.environment["TENORA_HOME"] += "-other"
    third = fetching.serve(fetching.port)
    _, said = third.communicate(timeout=PATIENCE)
    assert (third.returncode, "Cannot listen on" in said) == (1, True)


def test_kernels_are_compiled_while_the_base_downloads(
    tmp_path: Path, silent_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))  # of a machine that has compiled nothing yet
    with running(tmp_path / "home", silent_index) as server:
        until(lambda: server.runs("tenora.engine.compiling"))
        assert server.runs("download")
        children = server.children()
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=PATIENCE)
        assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []  # the compiler too


def test_a_first_start_that_is_terminated_leaves_no_process_and_no_half_written_base(fetching: Fetching) -> None:
    children = fetching.children()
    assert children
    assert fetching.left_over()
    fetching.process.send_signal(signal.SIGTERM)
    _, said = fetching.process.communicate(timeout=PATIENCE)
    assert fetching.process.returncode == 0, said
    assert "Traceback" not in said
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    assert fetching.left_over() == []


def test_what_a_killed_process_ran_ends_with_it(tmp_path: Path) -> None:
    program = "import subprocess, sys; from tenora.processes import bound_to_parent as b; subprocess.run(b('code'))"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    until(lambda: any("code" in child.cmdline() for child in psutil.Process(parent.pid).children()))
    children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    assert bound_to_parent("pip", "download")[3] == str(os.getpid())


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--log-level", "loud", ("debug", "info", "warning", "error")),
        ("--device", "abacus", ("auto", "cpu", "cuda")),
        ("--dtype", "int3", ("bfloat16", "float32")),
        ("--role", "boss", ("serve", "train")),
        ("--port", "99999", ("65535",)),
        ("--port", "http", ("integer",)),
        ("--threads", "-1", ("greater than or equal to 0",)),
        ("--max-adapters", "1000000000", ("65536",)),  # of each slot there is a row in tables in memory
        ("--training-share", "2", ("0.95",)),
        ("--drain-seconds", "inf", ("finite",)),
        ("--engine-start-seconds", "nan", ("finite",)),
    ],
)
def test_a_setting_that_means_nothing_is_a_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(serving, "run", lambda _: pytest.fail("it was taken"))
    variable = f"TENORA_{flag[2:].replace('-', '_').upper()}"
    for arguments, extra in ([flag, value], {}), ([], {variable: value}):
        done = CliRunner().invoke(app, ["serve", *arguments], env={"TENORA_HOME": str(tmp_path), **extra})
        assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.output
        assert flag in done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["short", " with-a-space-before-it"])
def test_a_key_that_cannot_be_one_is_told_before_anything_is_claimed_or_downloaded(tmp_path: Path, key: str) -> None:
    home = tmp_path / "home"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {"TENORA_HOME": str(home), "TENORA_API_KEY": key, "TENORA_PORT": str(port)}
        done = CliRunner().invoke(app, ["serve"], env=environment)
    assert done.exit_code == 1, done.output
    assert "TENORA_API_KEY must have at least 16 characters and no spaces" in done.stderr
    assert key.strip() not in done.output
    assert not home.exists()


def test_a_state_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "TENORA_HOME": str(tmp_path / "file" / "home")}
    command = [sys.executable, "-m", "tenora", "serve"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr, "TENORA_HOME" in done.stderr) == (1, False, True)


async def test_where_the_server_is_and_what_it_serves_is_written_for_its_owner_alone(service: Service) -> None:  # noqa: F811
    note = service.settings.root / "server.json"
    note.write_text("{}")  # of a process that was killed
    note.chmod(0o644)
    with (
        serving.listening(service.settings.model_copy(update={"port": 0})) as listener,
        serving.announced(service.settings, service.control, listener),
    ):
        assert stat.S_IMODE(note.stat().st_mode) == 0o600
        assert json.loads(note.read_text())["url"] == serving.url_of(listener)
    assert not note.exists()
