"""A worker as a child: started, asked, ended with everything that it started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WORKERS = Path(__file__).with_name("workers")
START_SECONDS = 300.0
ANSWER_SECONDS = 600.0


class WorkerError(Exception):
    """A worker ended or did not answer; the message says where its output is."""


class Worker:
    """One process of a peer, in a session of its own."""

    def __init__(self, python: Path, peer: str, settings: Mapping[str, Any], log: Path) -> None:
        self.log = log
        command = [str(python), str(WORKERS / f"{peer}_worker.py"), json.dumps(settings)]
        # Neither our path nor our number of threads: each worker sets the latter in its peer's own way.
        dropped = ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            self._answer(START_SECONDS)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, **question: Any) -> dict[str, Any]:
        """One measurement.

        Raises:
            WorkerError: if there is no answer.
        """
        if self._process.stdin is None:
            raise WorkerError("the worker has no stdin")
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(ANSWER_SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any]:
        pipe = self._process.stdout
        if pipe is None:
            raise WorkerError("the worker has no stdout")
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"no answer within {seconds:.0f} s; see {self.log}")
            piece = os.read(pipe.fileno(), 65536)
            if not piece:
                raise WorkerError(f"ended with status {self._process.wait()}; see {self.log}")
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: the end of its stdin, and after a while SIGKILL to whatever is left of its session."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
