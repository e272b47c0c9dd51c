"""The line between the service and its worker: what is asked, what is answered, and what an end of it tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tenora.control.worker import line
from tenora.control.worker.line import ServiceEnd, Welcome, WorkerEnd
from tenora.unix_socket import connect, listen, pack, read_message
from tests.support.patience import PATIENCE

WELCOME = Welcome("base", "/models/base")


class Queue:
    """A worker's jobs: remembers what it is told; letting go of a job takes until `go`."""

    leases_lost = 0
    worker_up = True

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.asked: list[tuple[str, str, bool]] = []
        self.go = asyncio.Event()
        self.fails = False

    def wake(self) -> None:
        self.woken.set()

    async def leave(self, tenant_id: str, job_id: str, *, pause: bool) -> None:
        self.asked.append((tenant_id, job_id, pause))
        await self.go.wait()
        if self.fails:
            raise RuntimeError("defect")


@pytest.fixture(autouse=True)
def _an_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "ANSWER_SECONDS", PATIENCE)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[ServiceEnd]:
    end = ServiceEnd(listen(tmp_path / "worker.sock"), WELCOME)
    await end.start()
    yield end
    await end.close()


async def joined(directory: Path, service: ServiceEnd) -> WorkerEnd:
    worker = await WorkerEnd.open(connect(directory / "worker.sock"))
    assert worker is not None
    async with asyncio.timeout(PATIENCE):
        await service.connected.wait()
    return worker


async def gone(service: ServiceEnd) -> None:
    async with asyncio.timeout(PATIENCE):
        while service.connected.is_set():  # noqa: ASYNC110  # it has an event for the other way only
            await asyncio.sleep(0.005)


async def test_a_worker_hears_first_what_is_served_and_then_what_it_is_asked(
    service: ServiceEnd, tmp_path: Path
) -> None:
    assert service.worker_up is False
    worker, queue = await joined(tmp_path, service), Queue()
    assert worker.welcome == WELCOME
    assert service.worker_up is True
    service.wake()
    leaving = asyncio.create_task(service.leave("tenant", "job", pause=True))
    await asyncio.sleep(0)
    worker.serve(queue)  # what was asked before comes first
    async with asyncio.timeout(PATIENCE):
        await queue.woken.wait()
        while not queue.asked:  # noqa: ASYNC110  # what another task notes
            await asyncio.sleep(0.005)
    assert queue.asked == [("tenant", "job", True)]
    assert not leaving.done(), "it is answered when the job was let go"
    service.wake()
    queue.go.set()
    await leaving
    service.stop()
    async with asyncio.timeout(PATIENCE):
        await worker.stop.wait()
    await worker.close()
    await gone(service)
    assert service.worker_up is False


async def test_two_jobs_that_are_taken_are_answered_each_for_itself(service: ServiceEnd, tmp_path: Path) -> None:
    worker, queue = await joined(tmp_path, service), Queue()
    worker.serve(queue)
    queue.go.set()
    await asyncio.gather(*(service.leave("tenant", f"job-{n}", pause=False) for n in range(3)))
    assert sorted(queue.asked) == [("tenant", f"job-{n}", False) for n in range(3)]
    await worker.close()


async def test_a_defect_in_letting_go_is_answered_all_the_same(
    service: ServiceEnd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker, queue = await joined(tmp_path, service), Queue()
    worker.serve(queue)
    queue.fails = True
    queue.go.set()
    async with asyncio.timeout(PATIENCE):
        await service.leave("tenant", "job", pause=True)
    assert "could not be let go" in caplog.text
    assert not worker.lost.is_set()
    await worker.close()


async def test_a_worker_that_dies_has_let_everything_go(service: ServiceEnd, tmp_path: Path) -> None:
    worker, queue = await joined(tmp_path, service), Queue()
    worker.serve(queue)
    leaving = asyncio.create_task(service.leave("tenant", "job", pause=True))
    async with asyncio.timeout(PATIENCE):
        while not queue.asked:  # noqa: ASYNC110  # what another task notes
            await asyncio.sleep(0.005)
        await worker.close()
        await leaving
    await service.leave("tenant", "other", pause=True)  # nobody is asked
    assert queue.asked == [("tenant", "job", True)]


async def test_a_worker_that_does_not_answer_is_waited_for_no_longer_than_it_may_take(
    service: ServiceEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(line, "ANSWER_SECONDS", 0.05)
    worker, queue = await joined(tmp_path, service), Queue()
    worker.serve(queue)
    await service.leave("tenant", "job", pause=True)
    assert "has not let it go" in caplog.text
    queue.go.set()
    await service.leave("tenant", "other", pause=True)  # the late answer is nobody's
    await worker.close()


async def test_what_workers_count_adds_up_over_their_lives(service: ServiceEnd, tmp_path: Path) -> None:
    for counted, expected in ((2, 2), (3, 5)):
        worker = await joined(tmp_path, service)
        worker.count(counted - 1)
        worker.count(counted)
        async with asyncio.timeout(PATIENCE):
            while service.leases_lost != expected:  # noqa: ASYNC110  # it comes over the socket
                await asyncio.sleep(0.005)
        await worker.close()
        await gone(service)
        assert service.leases_lost == expected


async def test_a_second_worker_is_sent_away_and_the_first_one_stays(service: ServiceEnd, tmp_path: Path) -> None:
    worker = await joined(tmp_path, service)
    assert await WorkerEnd.open(connect(tmp_path / "worker.sock")) is None
    assert service.worker_up is True
    await worker.close()


async def test_a_service_that_ends_tells_its_worker(service: ServiceEnd, tmp_path: Path) -> None:
    worker = await joined(tmp_path, service)
    await service.close()
    async with asyncio.timeout(PATIENCE):
        await worker.lost.wait()
    assert not worker.stop.is_set()
    await worker.close()


async def test_what_cannot_be_read_ends_the_line_and_not_the_service(
    service: ServiceEnd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=connect(tmp_path / "worker.sock"))
    assert await read_message(reader)
    writer.write(pack(b"\xff\xff"))
    async with asyncio.timeout(PATIENCE):
        assert await reader.read() == b""
    writer.close()
    await gone(service)
    assert "cannot be read" in caplog.text
    await (await joined(tmp_path, service)).close()


async def test_a_service_that_never_trains_has_no_worker_to_be_up() -> None:
    end = ServiceEnd(None, WELCOME)
    await end.start()
    assert end.worker_up is None
    end.wake()
    await end.leave("tenant", "job", pause=True)
    await end.close()
