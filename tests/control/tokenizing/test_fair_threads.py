"""Threads for tenants' long work: in turn, bounded, and left behind when nobody waits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from tenora.control.tokenizing.fair_threads import AbandonedError, Check, FairThreads
from tenora.errors import RateLimitedError, UnavailableError
from tests.support.patience import PATIENCE


@pytest.fixture
async def one() -> AsyncIterator[FairThreads]:
    threads = FairThreads("test", 1, most_waiting=3)
    yield threads
    threads.close()


class Gate:
    """Work that says when it has begun and goes on when it may."""

    def __init__(self) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        self.ended: list[BaseException | None] = []
        self.over = threading.Event()

    def __call__(self, check: Check) -> str:
        self.begun.set()
        self.may.wait()
        try:
            check()
        except AbandonedError as error:
            self.ended.append(error)
            raise
        finally:
            self.over.set()
        return "done"


async def test_nothing_is_kept_of_a_group_that_is_gone(one: FairThreads) -> None:
    for number in range(20):
        assert await one.run(f"tenant-{number}", lambda _: 7) == 7
    assert (dict(one._waiting), dict(one._running)) == ({}, {})


def noting(order: list[str], name: str) -> Callable[[Check], None]:
    return lambda check: order.append(name)


async def test_the_groups_take_turns(one: FairThreads) -> None:
    gate, order = Gate(), list[str]()
    running = [asyncio.create_task(one.run("a", gate))]
    await asyncio.to_thread(gate.begun.wait)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        running.append(asyncio.create_task(one.run(name[0], noting(order, name))))
        await asyncio.sleep(0)
    gate.may.set()
    await asyncio.gather(*running)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_too_much_waiting_work_of_a_group_is_refused_and_another_groups_is_not(one: FairThreads) -> None:
    gate, order = Gate(), list[str]()
    running = [asyncio.create_task(one.run("a", gate))]
    await asyncio.to_thread(gate.begun.wait)
    running += [asyncio.create_task(one.run("a", noting(order, str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimitedError, match="retry"):
        await one.run("a", noting(order, "refused"))
    other = asyncio.create_task(one.run("b", noting(order, "b")))
    gate.may.set()
    await asyncio.gather(*running, other)
    assert sorted(order) == ["0", "1", "2", "b"]


async def test_cancelled_work_ends_at_its_next_check_and_waiting_work_never_begins(one: FairThreads) -> None:
    gate, order = Gate(), list[str]()
    runs = asyncio.create_task(one.run("a", gate))
    await asyncio.to_thread(gate.begun.wait)
    waits = asyncio.create_task(one.run("a", noting(order, "waited")))
    await asyncio.sleep(0)
    for task in (runs, waits):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.may.set()
    await asyncio.to_thread(gate.over.wait)
    assert [type(error) for error in gate.ended] == [AbandonedError]
    await one.run("a", noting(order, "next"))  # the thread lives on
    assert order == ["next"]


async def test_a_group_has_no_more_threads_than_it_may() -> None:
    threads = FairThreads("test", 2, per_share_group=1)
    first, second, other = Gate(), Gate(), Gate()
    running = [asyncio.create_task(threads.run(*pair)) for pair in (("a", first), ("a", second), ("b", other))]
    await asyncio.to_thread(first.begun.wait)
    await asyncio.to_thread(other.begun.wait)
    assert not second.begun.is_set()
    for gate in (first, other, second):
        gate.may.set()
    assert await asyncio.gather(*running) == ["done"] * 3
    threads.close()


async def test_errors_reach_whoever_waits(one: FairThreads) -> None:
    def fail(check: Check) -> None:
        raise ValueError("so it is")

    with pytest.raises(ValueError, match="so it is"):
        await one.run("a", fail)


async def test_closing_waits_for_nothing(one: FairThreads) -> None:
    gate, order = Gate(), list[str]()
    running = asyncio.create_task(one.run("a", gate))
    await asyncio.to_thread(gate.begun.wait)
    waiting = asyncio.create_task(one.run("a", noting(order, "waited")))
    await asyncio.sleep(0)
    one.close()
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await one.run("a", noting(order, "late"))
    running.cancel()
    gate.may.set()
    assert order == []


def test_a_process_ends_well_beside_work_that_does_not() -> None:
    """What `tenora serve` does at its end. Work in a pool of the standard library would hold the process for ever."""
    source = (
        "import asyncio, threading\n"
        "from tenora.control.tokenizing.fair_threads import FairThreads, leave_threads\n"
        "async def main():\n"
        "    threads, begun = FairThreads('x', 1), threading.Event()\n"
        "    task = asyncio.create_task(threads.run('a', lambda check: begun.set() or threading.Event().wait()))\n"
        "    await asyncio.to_thread(begun.wait)\n"
        "    task.cancel()\n"
        "    threads.close()\n"
        "asyncio.run(main())\n"
        "print('closed')\n"
        "leave_threads()\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr
