"""The line between the service and its worker: who wakes whom, and how a job is taken out of the worker's hands.

What a job is stands in the registry. What crosses the line only spares a look at it: that there is something to claim,
that a job was cancelled or paused. A line that ends tells each side at once that the other is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from typing import TypeVar

import msgspec

from tenora.control.jobs.queue import JobQueue
from tenora.unix_socket import pack, read_message

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 15.0  # for a worker's answer that it has let a job go: more than it takes for a run's last state


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Said first: the base that the service serves, by its id and its directory."""

    model_id: str
    directory: str


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """There may be something to claim."""


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """A job was taken from the worker; `number` comes back in the answer."""

    number: int
    tenant_id: str
    job_id: str
    pause: bool


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Save the state of the runs, let the jobs go, and end."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer to `Leave`."""

    number: int


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """What the worker has counted since it began."""

    leases_lost: int


ToWorker = Welcome | Wake | Leave | Stop
ToService = Done | Counted
_Message = TypeVar("_Message", ToWorker, ToService)

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_service: msgspec.msgpack.Decoder[ToService] = msgspec.msgpack.Decoder(ToService)


def _write(writer: asyncio.StreamWriter, message: ToWorker | ToService) -> None:
    writer.write(pack(_encoder.encode(message)))


async def _next(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[_Message]) -> _Message | None:
    """The next message; None when the line has ended or says what cannot be read."""
    try:
        frame = await read_message(reader)
        return None if frame is None else decoder.decode(frame)
    except (msgspec.DecodeError, ValueError) as error:
        _log.error("the other end of the worker's line sent what cannot be read", extra={"reason": str(error)})
        return None


class ServiceEnd:
    """The service's end: its `JobQueue`. One worker at a time; without one, jobs wait in the registry.

    Attributes:
        connected: set while a worker is at the other end.
    """

    def __init__(self, listener: socket.socket | None, welcome: Welcome) -> None:
        """`listener` listens where the worker connects to; it is closed in `close`. None: none shall ever come."""
        self.connected = asyncio.Event()
        self._listener = listener
        self._welcome = welcome
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._leaving: dict[int, asyncio.Future[None]] = {}
        self._leases_lost = 0  # by workers that are gone
        self._leases_lost_now = 0

    async def start(self) -> None:
        """Let a worker in."""
        if self._listener is not None:
            self._server = await asyncio.start_unix_server(self._follow, sock=self._listener)

    async def close(self) -> None:
        """Let nobody in any more, and end the line."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()
        if self._listener is not None:
            self._listener.close()

    @property
    def leases_lost(self) -> int:
        """Jobs that another process took because a worker of this service had let their lease run out."""
        return self._leases_lost + self._leases_lost_now

    @property
    def worker_up(self) -> bool | None:
        """Whether a worker is at the other end; None where none shall ever come."""
        return None if self._listener is None else self.connected.is_set()

    def wake(self) -> None:
        """There may be something to claim; a worker that is not there yet looks when it comes."""
        self._send(Wake())

    def stop(self) -> None:
        """Have the worker end; what runs is saved."""
        self._send(Stop())

    async def leave(self, tenant_id: str, job_id: str, *, pause: bool) -> None:
        """The job was taken from the worker, if it had it.

        With `pause` this returns when the run has ended and its events are recorded, or after a while. A worker that is
        not there has no run; it looks at the files of ended jobs when it starts.
        """
        if self._writer is None:
            return
        number = next(self._numbers)
        answered = self._leaving[number] = asyncio.get_running_loop().create_future()
        self._send(Leave(number, tenant_id, job_id, pause))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await answered
        except TimeoutError:
            _log.warning("job %s: the worker has not let it go within %g s", job_id, ANSWER_SECONDS)
        finally:
            del self._leaving[number]

    def _send(self, message: ToWorker) -> None:
        if self._writer is not None:
            _write(self._writer, message)

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A worker's connection from its beginning to its end."""
        if self._writer is not None:
            writer.close()  # only the holder of the worker's lock connects; another is on its way out
            return
        self._writer = writer
        self._send(self._welcome)
        self.connected.set()
        try:
            while (message := await _next(reader, _to_service)) is not None:
                match message:
                    case Done(number=number):
                        if (answered := self._leaving.get(number)) is not None and not answered.done():
                            answered.set_result(None)
                    case Counted(leases_lost=count):
                        self._leases_lost_now = count
        finally:
            self._writer = None
            self.connected.clear()
            self._leases_lost, self._leases_lost_now = self.leases_lost, 0
            for answered in self._leaving.values():
                if not answered.done():
                    answered.set_result(None)  # a worker that is gone has let everything go
            writer.close()


class WorkerEnd:
    """The worker's end.

    Attributes:
        welcome: what the service said first.
        lost: set when the service is gone.
        stop: set when the service wants the worker to end.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, welcome: Welcome) -> None:
        self.welcome = welcome
        self.lost = asyncio.Event()
        self.stop = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._queue: asyncio.Future[JobQueue] = asyncio.get_running_loop().create_future()
        self._leaving: set[asyncio.Task[None]] = set()
        self._following = asyncio.create_task(self._follow(), name="worker-line")

    @classmethod
    async def open(cls, connection: socket.socket) -> WorkerEnd | None:
        """Take the line up; None if the service ended it at once."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        welcome = await _next(reader, _to_worker)
        if not isinstance(welcome, Welcome):
            writer.close()
            return None
        return cls(reader, writer, welcome)

    def serve(self, queue: JobQueue) -> None:
        """Do from now on what the service asks; what it has asked until now comes first."""
        self._queue.set_result(queue)

    def count(self, leases_lost: int) -> None:
        """Tell what was counted."""
        _write(self._writer, Counted(leases_lost))

    async def close(self) -> None:
        """End the line."""
        for task in (self._following, *self._leaving):
            task.cancel()
        await asyncio.gather(self._following, *self._leaving, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _follow(self) -> None:
        try:
            while (message := await _next(self._reader, _to_worker)) is not None:
                match message:
                    case Stop():
                        self.stop.set()
                    case Wake():
                        (await self._served()).wake()
                    case Leave():
                        task = asyncio.create_task(self._leave(message), name=f"leave-{message.job_id}")
                        self._leaving.add(task)
                        task.add_done_callback(self._leaving.discard)
        finally:
            self.lost.set()

    async def _served(self) -> JobQueue:
        return await asyncio.shield(self._queue)

    async def _leave(self, message: Leave) -> None:
        try:
            queue = await self._served()
            await queue.leave(message.tenant_id, message.job_id, pause=message.pause)
        except Exception:  # noqa: BLE001 (logged; the service must hear an answer, and the worker must live on)
            _log.exception("job %s could not be let go", message.job_id)
        _write(self._writer, Done(message.number))
