"""`tenora serve` as a child of this program: started, waited for, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tenora_client import Bar

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 45.0
"""Longer than the server's own drain, so that it is killed only if it hangs."""


class ServerError(Exception):
    """The server or the download of the base failed; the message says where the reason is written."""


def command(*arguments: str) -> list[str]:
    """The `tenora` command that is installed beside this Python."""
    path = Path(sys.executable).with_name("tenora")
    if not path.exists():
        raise ServerError(f"There is no {path}. `make setup` installs it.")
    return [str(path), *arguments]


def fetch_base() -> None:
    """Fetch the base model if it is not there yet; the command draws its own progress."""
    model = os.environ.get("TENORA_MODEL")
    finished = subprocess.run(command("pull", *([model] if model else [])), check=False)
    if finished.returncode:
        raise ServerError("The base model could not be fetched; the reason is above.")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and its like back until the block ends: a child that has started must be known before we go."""
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            raise KeyboardInterrupt


class Server:
    """One server on a free port. Leaving the `with` block stops it: SIGTERM, and SIGKILL if it does not listen.

    It runs in a session of its own, so that Ctrl-C reaches only this program, which then stops it in order.
    """

    def __init__(self) -> None:
        home = Path(os.environ.get("TENORA_HOME") or "~/.tenora").expanduser()
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log = home / "demo-server.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log.touch(mode=0o600)  # the first start prints the key
        with self.log.open("wb") as log, uninterrupted():
            self._process = subprocess.Popen(
                command("serve", "--host", "127.0.0.1", "--port", str(port)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Return once the server takes requests.

        Raises:
            ServerError: if it ends. It does so by itself when its start stands still.
        """
        process, started = self._running(), time.monotonic()
        with Bar("starting tenora serve") as bar:
            while (state := self._state()) is not None:
                if process.poll() is not None:
                    raise ServerError(f"tenora serve ended with status {process.returncode}:\n{self._tail()}")
                waited = f"{time.monotonic() - started:.0f} s"
                bar.draw(state.get("done", 0), state.get("total", 0), f"{state.get('message', '')}  {waited}".strip())
                time.sleep(0.25)
            bar.line(f"tenora serve is ready at {self.url}")

    def wait(self) -> None:
        """Return when the server has ended by itself."""
        self._running().wait()

    def stop(self) -> None:
        """End the server and wait for it; harmless if it has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("The server was not started.")
        return self._process

    def _state(self) -> dict[str, Any] | None:
        """How far its start is, as it says itself; nothing known yet is empty, ready is None."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=5.0)
            return None if answer.is_success else dict(answer.json())
        except (httpx.TransportError, ValueError):
            return {}

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-15:])
