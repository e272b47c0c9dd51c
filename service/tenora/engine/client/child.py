"""Starts the engine as a child process and watches it. Free of torch: the parent never loads a tensor."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from tenora.config import Settings
from tenora.engine.client.link import decode_event, encode
from tenora.engine.messages import Command, Event, Ready
from tenora.environment import for_child
from tenora.processes import describe_exit, hand_over

LAST_WORDS_MS = 50  # after the child's exit, its last frames are read until this much silence
MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS


def available_cpus() -> int:
    """Cores that this process may use: its affinity mask, and the quota of its container, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(cores, cgroup_cpus() or cores)


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """CPUs of the control group's quota (v2 `cpu.max`, else v1 `cpu.cfs_*`), rounded up; None without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    if quota in {"max", "-1"}:
        return None
    return max(1, math.ceil(int(quota) / int(period)))


def launch_message(settings: Settings, model_dir: Path, address: str, door: Path | None = None) -> bytes:
    """What the child reads from its standard input: everything it needs, so that it reads no environment again.

    The API key and the database's URL, which may hold a password, are the parent's business alone.
    """
    values = settings.model_dump(mode="json", exclude={"api_key", "database_url"})
    launch = {
        "settings": values,
        "model_dir": str(model_dir),
        "address": address,
        "door": None if door is None else str(door),
        "parent": os.getpid(),
    }
    return json.dumps(launch).encode()


class ProcessLink:
    """One child process. Messages cross a Unix socket in a directory that only this user can enter.

    Once the child has connected, the directory is removed: the connection needs no name any longer, and no kill -9 can
    leave it behind.
    """

    def __init__(self, settings: Settings, model_dir: Path, door: Path | None = None) -> None:
        """`door`: where the child lets other processes in; it outlasts the child, and the next one takes it."""
        self._settings = settings
        self._model_dir = model_dir
        self._door = door
        self._directory: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._on_event: Callable[[Event], None] = _ignore
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        # No high-water marks: the engine must never block on a slow API, which bounds every request's buffer itself.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)

    @property
    def pid(self) -> int | None:
        """Process id of the child, once started."""
        return self._process.pid if self._process else None

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Bind the socket and start the child. Raises OSError if either is impossible."""
        self._on_event = on_event
        try:
            self._directory = _private_directory()
            address = f"ipc://{self._directory / 'engine'}"
            try:
                self._socket.bind(address)
            except zmq.ZMQError as error:  # no OSError, and it must not end the supervisor
                raise OSError(error.errno, f"no socket at {address}: {error.strerror}") from error
            self._process = await _spawn(self._settings)
            await hand_over(self._process, launch_message(self._settings, self._model_dir, address, self._door))
        except BaseException:
            self.kill()
            self._clean_up()
            raise
        self._receiver = asyncio.create_task(self._receive(), name="engine-receiver")

    def send(self, command: Command) -> None:
        """Hand a command to the socket."""
        sent = asyncio.ensure_future(self._socket.send(encode(command), flags=zmq.NOBLOCK))
        sent.add_done_callback(lambda future: future.cancelled() or future.exception())  # lost: the child is dead

    async def closed(self) -> str:
        """Wait for the child's exit, deliver its last events, clean up."""
        if self._process is None or self._receiver is None:
            return "it was never started"
        exited = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait([exited, self._receiver], return_when=asyncio.FIRST_COMPLETED)
            if self._receiver.done():  # only an undecodable frame ends it: parent and child disagree
                self.kill()
                await exited
                return f"it sent what cannot be read: {self._receiver.exception()}"
            await self._stop_receiver()
            while await self._socket.poll(LAST_WORDS_MS):
                self._deliver(await self._socket.recv())
            return describe_exit(exited.result())
        finally:
            self.kill()
            exited.cancel()
            await self._stop_receiver()
            self._clean_up()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _receive(self) -> None:
        while True:
            self._deliver(await self._socket.recv())

    def _deliver(self, frame: bytes) -> None:
        event = decode_event(frame)
        if isinstance(event, Ready):
            self._remove_directory()
        self._on_event(event)

    async def _stop_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.wait([self._receiver])

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _clean_up(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self._remove_directory()


def _ignore(_: Event) -> None:
    """What happens to events before `open`: there are none."""


def _private_directory() -> Path:
    """A new directory of mode 0700 whose path leaves room for a Unix socket's name."""
    directory = Path(tempfile.mkdtemp(prefix="tenora-"))
    if len(os.fsencode(directory / "engine")) > MAX_SOCKET_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="tenora-", dir="/tmp"))
    return directory


async def _spawn(settings: Settings) -> asyncio.subprocess.Process:
    threads = str(settings.threads or available_cpus())
    # OpenMP sizes its pool when it is imported, before the child could say how many threads it wants.
    environment = for_child({"OMP_NUM_THREADS": threads})
    # After each operation of torch its idle threads spin, by default for milliseconds, on cores that our own kernels
    # want next: a forward pass of 512 tokens took half as long again.
    environment.setdefault("GOMP_SPINCOUNT", "2000")
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the working directory is not a place to import from
        "-m",
        "tenora.engine",
        stdin=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,  # the terminal's Ctrl-C is for the parent, which decides when the child ends
    )
