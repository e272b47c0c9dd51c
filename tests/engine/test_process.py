"""The engine as a real child process on a tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine.client import client
from tenora.engine.client.child import MAX_SOCKET_PATH, ProcessLink, _private_directory, launch_message
from tenora.engine.client.client import AsyncEngine
from tenora.engine.client.link import ThreadLink
from tenora.engine.messages import Event, Generate, SequenceOutput
from tenora.errors import UnavailableError, UnsupportedModelError
from tenora.model.catalog import _run
from tests.engine.driver import Driver
from tests.engine.requests import generate, sampling
from tests.support.hanging import impatient
from tests.support.patience import PATIENCE

SETTINGS = Settings(
    threads=1,
    dtype="float32",
    device="cpu",
    kv_cache_bytes=2**20,
    adapter_pool_bytes=2**20,
    max_adapters=4,
    log_level="warning",
)
PARENT = """
import asyncio, sys
from pathlib import Path
from tenora.config import Settings
from tenora.engine.client.client import AsyncEngine
assert "torch" not in sys.modules

async def main():
    engine = AsyncEngine(Settings.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
    await engine.start()
    print(engine._supervisor.link.pid, "torch" in sys.modules, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def run_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the private directories of sockets are made; nothing may be left in it."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own directories are too deep for a socket
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.iterdir()) == []
    directory.rmdir()


def pid_of(engine: AsyncEngine) -> int:
    assert isinstance(engine._supervisor.link, ProcessLink)
    assert engine._supervisor.link.pid is not None
    return engine._supervisor.link.pid


async def _exhaust(outputs: AsyncIterator[SequenceOutput]) -> None:
    async for _ in outputs:
        pass


async def tokens_of(engine: AsyncEngine, request: Generate) -> list[int]:
    return [token async for output in engine.generate(request) for token in output.token_ids]


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the state of another process
            await asyncio.sleep(0.02)


async def test_the_life_of_a_child(
    tiny_base: Path,
    run_directory: Path,
    driver: Callable[..., Driver],
    adapters: list[AdapterRef],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "OUTPUT_BUFFER", 10**9)
    descriptors = psutil.Process().num_fds()
    engine = AsyncEngine(SETTINGS, tiny_base)
    await engine.start()
    try:
        assert engine.healthy
        assert engine.ready.dtype == "float32"
        assert engine.ready.max_model_len == 512
        assert os.listdir(run_directory) == []  # noqa: PTH208  # the socket needs no name once the child is connected

        request = generate([5, 6, 7], sampling(max_tokens=20), adapter=adapters[1])
        expected = driver().tokens(request.token_ids, request.sampling, adapters[1])
        assert await tokens_of(engine, request) == expected

        # Signals that a terminal or an orchestrator sends to the whole group are the parent's business.
        child = pid_of(engine)
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        assert await tokens_of(engine, generate([9], request.sampling, adapter=adapters[1]))
        assert pid_of(engine) == child

        # An idle loop sleeps between its signs of life.
        before = psutil.Process(child).cpu_times()
        for _ in range(4):
            heard = engine._supervisor.last_heard
            await until(lambda heard=heard: engine._supervisor.last_heard > heard)  # type: ignore[misc]
        after = psutil.Process(child).cpu_times()
        assert after.user + after.system - before.user - before.system < 0.5

        # kill -9: what is open fails at once, and a new child answers.
        os.kill(child, signal.SIGSTOP)  # or it might have done the work before it is killed
        lost = asyncio.create_task(_exhaust(engine.generate(generate([5], sampling(max_tokens=500)))))
        await until(lambda: engine.open_requests == 1)
        os.kill(child, signal.SIGKILL)
        with pytest.raises(UnavailableError) as caught:
            await lost
        assert caught.value.code == "engine_lost"
        await until(lambda: engine.healthy)
        assert engine.restarts == 1
        assert pid_of(engine) != child
        again = generate(request.token_ids, request.sampling, adapter=adapters[1])
        assert await tokens_of(engine, again) == expected
        child = pid_of(engine)
    finally:
        await engine.close(5)
    assert not psutil.pid_exists(child)
    assert psutil.Process().num_fds() <= descriptors + 1  # torch may have opened one of its own


async def test_a_child_that_hangs_is_killed_and_replaced(tiny_base: Path, run_directory: Path) -> None:
    engine = AsyncEngine(SETTINGS, tiny_base)
    await engine.start()
    try:
        child = pid_of(engine)
        os.kill(child, signal.SIGSTOP)
        with impatient(engine), pytest.raises(UnavailableError) as caught:
            await _exhaust(engine.generate(generate([5], sampling(max_tokens=500))))
        assert caught.value.code == "engine_lost"
        with pytest.raises(UnavailableError):
            await tokens_of(engine, generate([9]))
        await until(lambda: engine.healthy)
        assert pid_of(engine) != child
        assert not psutil.pid_exists(child)
        assert engine.trouble is None
        assert await tokens_of(engine, generate([9], sampling(max_tokens=2)))
    finally:
        await engine.close(0)


async def test_a_child_that_cannot_load_says_why(tmp_path: Path, run_directory: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    others = set(psutil.Process().children(recursive=True))  # servers that other tests share
    engine = AsyncEngine(SETTINGS, tmp_path)
    with pytest.raises(UnsupportedModelError, match="mamba"):
        await engine.start()
    with suppress(psutil.NoSuchProcess):
        assert not set(psutil.Process().children(recursive=True)) - others


def test_a_killed_parent_takes_the_child_with_it(tiny_base: Path, run_directory: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, SETTINGS.model_dump_json(), str(tiny_base)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(run_directory)},
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid, holds_tensors = parent.stdout.readline().split()
    assert holds_tensors == "False"
    child = psutil.Process(int(pid))
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=PATIENCE)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_secrets_do_not_reach_the_child(tmp_path: Path) -> None:
    settings = Settings(api_key="tk-secret", database_url="postgresql://u:hunter2@h/d")
    message = launch_message(settings, tmp_path, "ipc:///x")
    assert b"tk-secret" not in message
    assert b"hunter2" not in message
    restored = Settings.model_validate(json.loads(message)["settings"])
    assert restored == settings.model_copy(update={"api_key": None, "database_url": None})


async def test_no_child_finds_a_secret_in_its_environment_and_it_tells_how_far_it_is_while_it_loads(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENORA_API_KEY", "tk-secret")
    monkeypatch.setenv("TENORA_DATABASE_URL", "postgresql://u:hunter2@h/d")
    engine, told = AsyncEngine(SETTINGS, tiny_base), []
    receive = engine._supervisor._receive

    def note(event: Event) -> None:
        receive(event)
        told.append(engine.loading)

    engine._supervisor._receive = note
    await engine.start()
    try:
        inherited = psutil.Process(pid_of(engine)).environ()
    finally:
        await engine.close(0)
    weights = [step for step in told if step is not None and step.phase == "weights"]
    assert weights[-1].done == weights[-1].total > 0
    assert "PATH" in inherited
    assert not [name for name in inherited if name.startswith("TENORA_")]

    said: list[str] = []
    program = "import os, json; print(json.dumps([name for name in os.environ if name.startswith('TENORA_')]))"
    assert _run([sys.executable, "-c", program], said.append, tmp_path)[0] == 0  # as a base is converted
    assert json.loads(said[0]) == []


def test_the_socket_path_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    directory = _private_directory()
    try:
        assert len(str(directory / "engine")) < MAX_SOCKET_PATH
        assert directory.stat().st_mode & 0o777 == 0o700
        assert list(deep.iterdir()) == []
    finally:
        directory.rmdir()


async def test_the_real_engine_in_a_thread(driver: Callable[..., Driver], adapters: list[AdapterRef]) -> None:
    """The seam for tests of other rooms; also the wake-up after a load, without which this would take half a second."""
    from tenora.engine.core import Engine

    tiny = driver()
    engine = AsyncEngine.in_thread(SETTINGS, lambda wake: Engine(tiny.engine.decoder, SETTINGS, wake=wake))
    await engine.start()
    assert isinstance(engine._supervisor.link, ThreadLink)
    try:
        requests = [generate([5, 6, seed], sampling(max_tokens=12), adapter=adapters[seed]) for seed in range(4)]
        answers = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer == tiny.tokens(request.token_ids, request.sampling, request.adapter)
        await until(lambda: engine.stats.generation_tokens == 48)
        await engine.evict(adapters[0].digest)
        await until(lambda: adapters[0].digest not in engine.stats.adapters_resident)
        assert engine.stats.kv_blocks_used == 0
    finally:
        await engine.close(1)


async def test_an_engine_whose_socket_cannot_be_had_is_told_as_one_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tried again by its supervisor, which any other kind of error would end."""
    monkeypatch.setattr("tenora.engine.client.child._private_directory", lambda: tmp_path / "gone")
    engine = AsyncEngine(SETTINGS, tmp_path)
    with pytest.raises(UnavailableError, match=r"could not be started: .*no socket at"):
        async with asyncio.timeout(PATIENCE):
            await engine.start()


@pytest.mark.full  # and, as a whole, by tests/e2e/test_worker.py
async def test_a_second_client_is_served_by_the_child_and_by_its_successor(tiny_base: Path, tmp_path: Path) -> None:
    door = tmp_path / "engine.sock"
    owner, guest = AsyncEngine(SETTINGS, tiny_base, door=door), AsyncEngine.attached(SETTINGS, door)
    await owner.start()
    try:
        await guest.start()
        assert guest.ready == owner.ready
        request = generate([5, 6, 7], sampling(max_tokens=20))
        expected = await tokens_of(owner, request)
        assert await asyncio.gather(tokens_of(owner, request), tokens_of(guest, request)) == [expected, expected]
        os.kill(pid_of(owner), signal.SIGSTOP)  # or it might have done the work before it is killed
        lost = asyncio.create_task(_exhaust(guest.generate(generate([5], sampling(max_tokens=500)))))
        await until(lambda: guest.open_requests == 1)
        os.kill(pid_of(owner), signal.SIGKILL)
        with pytest.raises(UnavailableError) as caught:
            await lost
        assert caught.value.code == "engine_lost"
        await until(lambda: guest.healthy)
        assert await tokens_of(guest, request) == expected
        assert owner.restarts == 1
        await guest.close(0)
        assert await tokens_of(owner, request) == expected, "a guest that leaves ends nothing of the owner's"
    finally:
        await guest.close(0)
        await owner.close(0)
