"""A real `tenora serve` of the tests: its own state, a free port, and every way to end it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tenora_client import AsyncClient, Client, RetryPolicy
from tests.support.patience import PATIENCE

TENORA = Path(sys.executable).with_name("tenora")
NO_RETRY = RetryPolicy(max_retries=0)


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE, poll: float = 0.05) -> None:
    """Wait for another process's doing; a condition that does not come true is a failure of the test that says what."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(poll)


class Server:
    """One `tenora serve`, started anew as often as a test likes on the same state directory."""

    def __init__(self, home: Path, model: Path, **settings: str) -> None:
        self.home = home
        self.log = home / "server.log"
        self.settings = {"TENORA_MODEL": str(model), "TENORA_DEVICE": "cpu", "TENORA_THREADS": "1", **settings}
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    # ---- life

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the command runs under: this state directory, and nothing of the developer's own settings."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TENORA_")}
        return {**inherited, **self.settings, "TENORA_HOME": str(self.home), **(extra or {})}

    def launch(self, port: int = 0, **extra: str) -> None:
        """Start the process without waiting for it; port 0 takes a free one."""
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(TENORA), "serve", "--port", str(port)],
                env=self.environment(extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self, **extra: str) -> None:
        """Start it and return once it is ready."""
        self.launch(**extra)
        until(self._ready_or_dead, f"ready; its log ends with\n{self.tail()}")
        assert self.process.poll() is None, self.tail()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self.process.terminate()

    def exit_status(self, seconds: float = PATIENCE) -> int:
        """Wait for the end."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to every process of the service at once, and wait until all are gone."""
        root = psutil.Process(self.process.pid)
        family = [root, *root.children(recursive=True)]
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue  # the engine dies with its parent
        self.process.wait(PATIENCE)
        until(lambda: not any(alive(member) for member in family), "every process of the service is gone")

    def stop(self) -> None:
        """End it, in order if possible; nothing is left running afterwards."""
        if self._process is None or self._process.poll() is not None:
            return
        self.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    # ---- views

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The parent process."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def engine(self) -> psutil.Process:
        """The engine's process."""
        return self._child("tenora.engine")

    def worker(self) -> psutil.Process:
        """The worker's process, as soon as it is at work."""
        until(lambda: self._has_child("tenora.cli.working"), f"there is a worker; the log ends with\n{self.tail()}")
        return self._child("tenora.cli.working")

    def _has_child(self, module: str) -> bool:
        return any(module in child.cmdline() for child in psutil.Process(self.process.pid).children())

    def _child(self, module: str) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if module in child.cmdline():
                return child
        raise AssertionError(f"there is no process of {module}")

    def ready(self) -> bool:
        """What /readyz says; False without a server."""
        return self.probe("/readyz") == 200

    def probe(self, path: str) -> int:
        """Status of a GET without a key; 0 without a server."""
        try:
            return httpx.get(f"{self.url}{path}", timeout=PATIENCE).status_code
        except httpx.TransportError:
            return 0

    def tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def key(self) -> str:
        """The bootstrap key of the default tenant."""
        return (self.home / "credentials").read_text().strip()

    def client(self, key: str | None = None) -> Client:
        """A client that never retries: a test wants to see every answer."""
        return Client(self.url, key or self.key(), retries=NO_RETRY, timeout=PATIENCE)

    def async_client(self, key: str | None = None) -> AsyncClient:
        """The same, asynchronous."""
        return AsyncClient(self.url, key or self.key(), retries=NO_RETRY, timeout=PATIENCE)

    def raw(self, key: str | None = None) -> httpx.Client:
        """Plain HTTP with a key, to see bytes."""
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key or self.key()}"}, timeout=PATIENCE
        )

    def command(self, *arguments: str) -> str:
        """Output of a `tenora` command on this state directory."""
        done = subprocess.run(
            [str(TENORA), *arguments], env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"tenora {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def new_key(self, tenant: str, *scopes: str) -> str:
        """A key made by the command line, read off its output."""
        flags = [flag for scope in scopes for flag in ("--scope", scope)]
        output = self.command("keys", "create", "--tenant", tenant, *flags)
        found = re.search(r"tk-[A-Za-z0-9_-]+", output)
        assert found is not None, output
        return found.group()

    def _ready_or_dead(self) -> bool:
        return self.process.poll() is not None or self.ready()


@contextmanager
def unfinished_request(url: str, key: str) -> Iterator[None]:
    """A request whose body is still on its way: while the block runs, the server has something to wait for."""
    at = httpx.URL(url)
    left = threading.Event()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {at.host}\r\nAuthorization: Bearer {key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 8000000\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((at.host, at.port or 80), PATIENCE) as connection:

        def go_on() -> None:
            while not left.wait(0.5):
                connection.sendall(b" " * 2048)  # a body that comes to a halt would be given up

        connection.sendall(head.encode())
        assert connection.recv(1024).startswith(b"HTTP/1.1 100"), "the application reads the body"
        sender = threading.Thread(target=go_on)
        sender.start()
        try:
            yield
        finally:
            left.set()
            sender.join()


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """The process stands still while the block runs: nothing that it does can come to its end meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that nobody reaps does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
