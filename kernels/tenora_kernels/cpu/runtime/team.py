"""Threads that share a computation without ever waiting for one that the system has not scheduled.

A *job* is a compiled function that every member runs at the same time. It is a sequence of *phases*, each a number of
equal tasks. A member claims the next task of a phase with an atomic counter, and leaves the phase when every task of it
is done. Whoever comes late finds nothing left to claim: on a machine that is busy with other processes the members that
do run do all the work. (Threads of OpenMP get fixed shares and spin until the slowest has done its own, which may be a
scheduler's time slice later.)
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.core import cgutils
from numba.extending import intrinsic

from tenora_kernels.cpu.runtime.compiled import compiled, job

__all__ = ["JOBS", "Team", "claim", "complete", "join", "noting"]

# The control block: int64, a cache line (8) for each counter.
_INSIDE, _OPEN, _FIRST = 0, 8, 16
_PHASE = 16
_SPINS = 2000
"""Pauses before a waiting member offers its core to others: some 20 µs, longer than most tasks."""

_WORD = ir.IntType(64)


def _counter(builder: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, _WORD.as_pointer()), [index])


@intrinsic
def _add(typing: Any, address: Any, index: Any, value: Any) -> Any:  # numba's own signature
    """int64 at `address[index]` += value, sequentially consistent; gives the value before."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _counter(builder, args[0], args[1]), args[2], "seq_cst")

    return types.int64(types.intp, types.intp, types.int64), codegen


@intrinsic
def _read(typing: Any, address: Any, index: Any) -> Any:
    """int64 at `address[index]`; what other members wrote before they changed it can be read afterwards."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(_counter(builder, args[0], args[1]), "acquire", 8)

    return types.int64(types.intp, types.intp), codegen


@intrinsic
def _give_way(typing: Any) -> Any:
    """Let the system run another thread on this core."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@compiled()
def claim(control, phase, tasks):
    """The next unclaimed task of a phase, or -1."""
    counter = _FIRST + phase * _PHASE
    # Reading first spares late members a write to a line that the others use.
    if _read(control, counter) >= tasks:
        return -1
    task = _add(control, counter, 1)
    return task if task < tasks else -1


@compiled()
def complete(control, phase):
    """A claimed task is done, with everything that it wrote."""
    _add(control, _FIRST + phase * _PHASE + 8, 1)


@compiled()
def _wait_until(control, index, value):
    spins = 0
    while _read(control, index) < value:
        spins += 1
        if spins > _SPINS:
            _give_way()


@compiled()
def join(control, phase, tasks):
    """Wait until every task of a phase is done."""
    _wait_until(control, _FIRST + phase * _PHASE + 8, tasks)


@job()
def _enter(control):
    _add(control, _INSIDE, 1)
    if _read(control, _OPEN) == 1:
        return True
    _add(control, _INSIDE, -1)
    return False


@job()
def _leave(control):
    _add(control, _INSIDE, -1)


@job()
def _close(control):
    """Let nobody in any more, then wait for those inside: their arguments may be freed afterwards."""
    _add(control, _OPEN, -1)
    spins = 0
    while _read(control, _INSIDE) > 0:
        spins += 1
        if spins > _SPINS:
            _give_way()


JOBS = (_enter, _leave, _close)
"""What teams call themselves, each with the address of a control block."""


class _Notes(threading.local):
    jobs: list[tuple[Any, tuple[Any, ...]]] | None = None


_notes = _Notes()


@contextmanager
def noting() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """In the block teams compute nothing for this thread; gives the jobs they were told to run, with argument types."""
    jobs: list[tuple[Any, tuple[Any, ...]]] = []
    _notes.jobs = jobs
    try:
        yield jobs
    finally:
        _notes.jobs = None


class Team:
    """The calling thread and `size - 1` threads of its own, which sleep between jobs and end with the process.

    Any thread may call `run`. While one does, the jobs of others run on those others alone.
    """

    def __init__(self, size: int) -> None:
        """A team of `size` members; threads start with the first job."""
        if size < 1:
            raise ValueError(f"a team needs at least one member, not {size}.")
        self.size = size
        self._post = _Post()
        self._calls = [threading.Semaphore(0) for _ in range(size - 1)]
        self._started = False
        self._busy = threading.Lock()

    @staticmethod
    @functools.cache
    def shared(size: int) -> Team:
        """The process's team of `size` members, for those who have no team of their own."""
        return Team(size)

    def run(self, job: Callable[..., None], phases: int, *args: Any) -> None:
        """Run `job(control, *args)` on every member and return when all of it is done.

        Args:
            job: a compiled function whose tasks never raise; `control` (an address) is for `claim`, `complete`, `join`.
            phases: numbers 0 … phases - 1 may be used as phases.
            args: whatever the job takes. Arrays and the memory behind addresses must live until this returns.
        """
        if _notes.jobs is not None:
            _notes.jobs.append((job, (types.int64, *map(typeof, args))))
            return
        control = np.zeros(_FIRST + phases * _PHASE, dtype=np.int64)
        control[_OPEN] = 1
        address = control.ctypes.data
        helped = bool(self._calls) and self._busy.acquire(blocking=False)
        try:
            if helped:
                self._call((job, control, address, args))
            job(address, *args)
        finally:
            _close(address)
            if helped:
                self._busy.release()

    def _call(self, job: tuple[Callable[..., None], Any, int, tuple[Any, ...]]) -> None:
        if not self._started:
            self._start()
        self._post.job = job
        for call in self._calls:
            call.release()

    def _start(self) -> None:
        for number, call in enumerate(self._calls, 1):
            name = f"tenora-kernels-{number}"
            threading.Thread(target=_serve, args=(self._post, call), name=name, daemon=True).start()
        self._started = True
        # The threads hold the post, not the team: a team that nobody holds sends its threads home.
        weakref.finalize(self, _dismiss, self._post, self._calls)


class _Post:
    """Where the members of a team find the latest job."""

    __slots__ = ("job",)

    def __init__(self) -> None:
        self.job: tuple[Callable[..., None], Any, int, tuple[Any, ...]] | None = None


def _dismiss(post: _Post, calls: list[threading.Semaphore]) -> None:
    post.job = None
    for call in calls:
        call.release()


def _serve(post: _Post, call: threading.Semaphore) -> None:
    """Help with job after job. A job that is over before this thread gets there is closed, and skipped."""
    while True:
        call.acquire()
        job = post.job
        if job is None:
            return
        function, control, address, args = job
        if _enter(address):
            try:
                function(address, *args)
            finally:
                _leave(address)
        del job, control, args  # frees the arrays while waiting
