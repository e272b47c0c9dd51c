"""The engine's process: loads the base, then serves the parent until told to stop or until the parent is gone."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tenora.config import Settings
from tenora.engine.channel import SocketChannel
from tenora.engine.client.link import start_failed
from tenora.engine.clients import OWNER
from tenora.engine.loop import run_loop
from tenora.engine.messages import Event
from tenora.errors import DeviceLostError, TenoraError
from tenora.processes import die_with_parent
from tenora.telemetry.logs import configure

_log = logging.getLogger(__name__)
DEVICE_LOST = 3
"""Exit status of an engine whose device failed for good."""


def main() -> int:
    """Run the child; its launch message comes on standard input. Returns the exit status."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # the parent decides when it ends
    launch: dict[str, Any] = json.load(sys.stdin)
    parent = int(launch["parent"])
    die_with_parent()
    if os.getppid() != parent:
        return 1  # it died before the line above
    settings = Settings.model_validate(launch["settings"])
    configure(settings.log_level)
    channel = SocketChannel(launch["address"], None if launch["door"] is None else Path(launch["door"]))
    try:
        status = serve(settings, Path(launch["model_dir"]), channel, parent)
    finally:
        channel.close()
    if status == DEVICE_LOST:
        logging.shutdown()
        os._exit(status)  # at an ordinary end a thread or a destructor could wait for the dead device
    return status


def serve(settings: Settings, model_dir: Path, channel: SocketChannel, parent: int) -> int:
    """Load, then loop. Returns the exit status."""

    def tell_owner(event: Event) -> None:
        channel.send(OWNER, event)

    try:
        # Here and not above: torch takes seconds to import, and signals must be ignored before.
        from tenora.engine.core import Engine  # noqa: PLC0415

        engine = Engine.load(settings, model_dir, wake=channel.wake, commands_wait=channel.waits, report=tell_owner)
    except Exception as error:  # noqa: BLE001 — whatever it is, the parent is told
        if not isinstance(error, TenoraError):
            _log.exception("the engine could not start")
        tell_owner(start_failed(error))
        return 1
    try:
        run_loop(engine, channel, orphaned=lambda: os.getppid() != parent)
    except DeviceLostError as error:
        _log.critical("the device failed for good; the engine ends to be replaced", extra={"reason": str(error)})
        return DEVICE_LOST
    return 0
