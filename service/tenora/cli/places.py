"""Where the processes of one state directory find each other: names in it."""

from __future__ import annotations

from typing import Final

ENGINE_SOCKET: Final = "engine.sock"
"""Where the engine lets the worker in."""
WORKER_SOCKET: Final = "worker.sock"
"""Where the service lets its worker in."""
