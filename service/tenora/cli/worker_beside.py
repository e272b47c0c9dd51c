"""The worker beside `tenora serve`: a process of its own, started again when it dies."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tenora.cli.places import WORKER_SOCKET
from tenora.config import Settings
from tenora.control.storage.directory import WORKER_LOCK, vacant_seat
from tenora.control.worker.line import ServiceEnd, Welcome
from tenora.control.worker.supervisor import WorkerSupervisor
from tenora.errors import ConfigurationError
from tenora.model.catalog import ResolvedModel
from tenora.unix_socket import listen

COMMAND = (sys.executable, "-P", "-m", "tenora.cli.working")


class WorkerBeside:
    """The worker of a service, whose role may be not to have one.

    Attributes:
        line: to it; without a worker, jobs are kept in the registry for whoever trains.
    """

    def __init__(self, settings: Settings, model: ResolvedModel) -> None:
        """Listen for it. Raises ConfigurationError if there is no place for that in the state directory."""
        self._settings = settings
        self._supervisor: WorkerSupervisor | None = None
        listener = None
        try:
            if self._trains:
                listener = listen(settings.root / WORKER_SOCKET)
            else:  # who connected to what another role left would wait for a word that nobody says
                (settings.root / WORKER_SOCKET).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigurationError(f"The worker's socket cannot be made in {settings.root}: {error}.") from error
        self.line = ServiceEnd(listener, Welcome(model.id, str(model.directory)))

    @property
    def _trains(self) -> bool:
        return self._settings.role != "serve"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep a worker as long as the block runs; afterwards what ran is saved."""
        if not self._trains:
            yield
            return
        await self.line.start()
        root = self._settings.root
        launch = self._settings.model_copy(update={"api_key": None}).model_dump_json().encode()
        self._supervisor = supervisor = WorkerSupervisor(
            COMMAND, launch, self.line, lambda: vacant_seat(root, WORKER_LOCK) is not None
        )
        supervisor.start()
        try:
            yield
        finally:
            await asyncio.shield(supervisor.close())

    def kill(self) -> None:
        """End the worker at once."""
        if self._supervisor is not None:
            self._supervisor.kill()

    async def close(self) -> None:
        """End the line."""
        await self.line.close()
