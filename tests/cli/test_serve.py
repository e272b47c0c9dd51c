"""`tenora serve` as a process, with the real engine and a tiny model: start, signals, end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import unfinished_request, until
from tests.support.patience import PATIENCE

pytestmark = pytest.mark.e2e
KEY = "tk-test-key-of-this-test-0123456789"
LONG = {"messages": [{"role": "user", "content": "Go on."}], "stream": True, "ignore_eos": True, "temperature": 1.0}


@dataclass
class Running:
    """A server process that said it is ready."""

    process: subprocess.Popen[str]
    url: str
    model: str

    @property
    def long(self) -> dict[str, object]:
        """A request long enough for a signal to come in the middle: the tiny model's whole context."""
        return {"model": self.model, **LONG}

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture
def running(tmp_path: Path, tiny_base: Path) -> Iterator[Running]:
    settings = {
        "TENORA_HOME": str(tmp_path / "home"),
        "TENORA_MODEL": str(tiny_base),
        "TENORA_API_KEY": KEY,
        "TENORA_DEVICE": "cpu",
        "TENORA_THREADS": "1",
        "TENORA_KV_CACHE_BYTES": str(16 * 2**20),
        "TENORA_ADAPTER_POOL_BYTES": str(16 * 2**20),
        "TENORA_DRAIN_SECONDS": "36000",  # who waits for it never ends
    }
    command = [sys.executable, "-m", "tenora", "serve", "--port", "0"]
    process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Tenora is ready at http://127.0.0.1:"), line
        note = json.loads((tmp_path / "home" / "server.json").read_text())
        assert note["url"] in line
        assert note["pid"] == process.pid
        yield Running(process, note["url"], note["model"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_idle_server_ends_at_once(running: Running, tmp_path: Path) -> None:
    with running.client() as client:
        assert client.get("/readyz").status_code == 200
        answer = client.post("/v1/chat/completions", json={**running.long, "stream": False, "max_tokens": 4}).json()
        assert answer["usage"]["completion_tokens"] == 4
    assert running.stop() == 0
    assert not (tmp_path / "home" / "server.json").exists()


def test_open_streams_finish_new_requests_are_refused(running: Running) -> None:
    with running.client() as client, running.client() as other:
        assert other.get("/readyz").status_code == 200  # its connection is open before the drain begins
        with client.stream("POST", "/v1/chat/completions", json=running.long) as stream:
            lines = stream.iter_lines()
            next(lines)
            with unfinished_request(running.url, KEY):
                running.process.send_signal(signal.SIGTERM)
                until(lambda: other.get("/readyz").status_code == 503, "readyz says 503")
                refused = other.post("/v1/chat/completions", json={**running.long, "stream": False})
            rest = [line for line in lines if line]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert running.process.wait(PATIENCE) == 0


def test_the_second_signal_ends_at_once(running: Running) -> None:
    with running.client() as client, unfinished_request(running.url, KEY):
        running.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503, "readyz says 503")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 128 + signal.SIGTERM
