"""Work shared by claiming: every task is done once, late members find nothing to do, nobody outlives the team."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from tenora_kernels.cpu.runtime.compiled import job
from tenora_kernels.cpu.runtime.team import Team, claim, complete, join
from tenora_kernels.cpu.runtime.values import peek
from tests.support.patience import PATIENCE


@job()
def _chain(control, phases, tasks, out):
    """Phase p adds to every element of row p the sum of row p - 1: wrong unless all of that is done."""
    for phase in range(phases):
        while True:
            task = claim(control, phase, tasks)
            if task < 0:
                break
            total = 1
            if phase > 0:
                total = 0
                for i in range(tasks):
                    total += out[phase - 1, i]
            out[phase, task] += total % 1000003
            complete(control, phase)
        join(control, phase, tasks)


def expected(phases: int, tasks: int) -> np.ndarray:
    out = np.zeros((phases, tasks), np.int64)
    out[0] = 1
    for phase in range(1, phases):
        out[phase] = out[phase - 1].sum() % 1000003
    return out


@pytest.mark.parametrize("size", [1, 2, 5])
def test_phases_follow_one_another_and_every_task_is_done_once(size: int) -> None:
    team = Team(size)
    for _ in range(50):
        out = np.zeros((40, 17), np.int64)
        team.run(_chain, 40, 40, 17, out)
        assert np.array_equal(out, expected(40, 17))


def test_jobs_that_follow_at_once_do_not_mix() -> None:
    """Members that wake late for one job must not take part in the next with the arguments of the first."""
    team = Team(4)
    outs = [np.zeros((2, 3), np.int64) for _ in range(400)]
    for out in outs:
        team.run(_chain, 2, 2, 3, out)
    assert all(np.array_equal(out, expected(2, 3)) for out in outs)


def test_a_team_beside_busy_threads_finishes() -> None:
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        team = Team(3)
        for _ in range(20):
            out = np.zeros((40, 17), np.int64)
            team.run(_chain, 40, 40, 17, out)
            assert np.array_equal(out, expected(40, 17))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_threads_end_with_their_team() -> None:
    before = set(threading.enumerate())
    team = Team(3)
    team.run(_chain, 1, 1, 1, np.zeros((1, 1), np.int64))
    members = set(threading.enumerate()) - before
    assert len(members) == 2
    del team
    gc.collect()
    for member in members:
        member.join(PATIENCE)
        assert not member.is_alive()


def test_a_team_needs_a_member() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        Team(0)


@job()
def _peek_float(address, index):
    return peek(address, index, np.float32(0))


def test_peek_reads_the_element() -> None:
    values = np.array([1.5, -2.25, 3.0], np.float32)
    assert _peek_float(values.ctypes.data, 1) == -2.25
