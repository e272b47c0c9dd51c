"""The worker beside a service: replaced when it dies, waited for when it is another's, ended with the service."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tenora.control.worker import supervisor
from tenora.control.worker.line import ServiceEnd, Welcome
from tenora.control.worker.supervisor import WorkerSupervisor
from tenora.unix_socket import listen
from tests.support.patience import PATIENCE

Make = Callable[..., WorkerSupervisor]
SAYS = "import sys, time; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10)); "  # what it was handed
LIVES = SAYS + "time.sleep(1e6)"
DIES = SAYS + "sys.exit(7)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + LIVES


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.001, 0.01))
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.01)


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """What the workers were handed, a line each."""
    path = tmp_path / "told"
    path.touch()
    return path


@pytest.fixture
async def make(tmp_path: Path, told: Path) -> AsyncIterator[Make]:
    made: list[WorkerSupervisor] = []
    line = ServiceEnd(listen(tmp_path / "worker.sock"), Welcome("base", "/base"))
    await line.start()

    def build(program: str, is_free: Callable[[], bool] = lambda: True) -> WorkerSupervisor:
        one = WorkerSupervisor((sys.executable, "-c", program, str(told)), b"a secret", line, is_free)
        made.append(one)
        return one

    yield build
    for one in made:
        one.kill()
        await one.close()
    await line.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # the state of another process
            await asyncio.sleep(0.005)


async def test_a_worker_that_dies_is_replaced_and_handed_the_same(make: Make, told: Path) -> None:
    keeper = make(DIES)
    keeper.start()
    await until(lambda: keeper.restarts >= 2)
    await until(lambda: told.read_text().splitlines()[:2] == ["a secret"] * 2)


async def test_a_worker_that_is_killed_is_replaced_by_another(
    make: Make, told: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = make(LIVES)
    keeper.start()
    await until(lambda: len(told.read_text().splitlines()) == 1)
    first = keeper.pid
    keeper.kill()
    await until(lambda: len(told.read_text().splitlines()) == 2)
    assert keeper.pid not in {None, first}
    assert keeper.restarts == 1
    assert [record.reason for record in caplog.records if "restarting" in record.message] == ["killed by signal 9"]


async def test_a_program_that_cannot_be_started_is_tried_again(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = make(LIVES)
    keeper._command = (str(tmp_path / "none"),)
    keeper.start()
    await until(lambda: keeper.restarts >= 2)
    assert keeper.pid is None
    assert "it could not be started" in str([getattr(record, "reason", "") for record in caplog.records])


async def test_no_worker_is_started_while_that_of_a_dead_service_works(make: Make, told: Path) -> None:
    looks, free = 0, False

    def is_free() -> bool:
        nonlocal looks
        looks += 1
        return free

    keeper = make(LIVES, is_free)
    keeper.start()
    await until(lambda: looks >= 3)
    assert keeper.pid is None
    free = True
    await until(lambda: keeper.pid is not None)


async def test_it_ends_while_it_waits_for_a_dead_services_worker(make: Make) -> None:
    keeper = make(LIVES, lambda: False)
    keeper.start()
    async with asyncio.timeout(PATIENCE):
        await keeper.close()
    assert keeper._task is not None
    assert keeper._task.exception() is None
    assert (keeper.pid, keeper.restarts) == (None, 0)


async def test_a_worker_that_has_not_reached_the_line_is_told_to_end_by_a_signal(make: Make, told: Path) -> None:
    keeper = make(LIVES)
    keeper.start()
    await until(lambda: bool(told.read_text()))
    async with asyncio.timeout(PATIENCE):
        await keeper.close()
    assert keeper._process is not None
    assert keeper._process.returncode == -15
    assert (keeper.pid, keeper.restarts) == (None, 0)


async def test_a_worker_that_does_not_end_is_killed(
    make: Make, told: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "EXIT_SECONDS", 0.1)
    keeper = make(DEAF)
    keeper.start()
    await until(lambda: bool(told.read_text()))
    pid = keeper.pid
    assert pid is not None
    async with asyncio.timeout(PATIENCE):
        await keeper.close()
    assert "it is killed" in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
