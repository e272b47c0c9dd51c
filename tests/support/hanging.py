"""Engines that hang, without a limit so short that a slow machine would seem to hang as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tenora.engine.client.client import AsyncEngine


@contextmanager
def impatient(engine: AsyncEngine) -> Iterator[None]:
    """While the block runs, an engine that says nothing is given up at once. For one that does stand still."""
    supervisor = engine._supervisor
    patience, supervisor._hang_seconds = supervisor._hang_seconds, 0.1
    try:
        yield
    finally:
        supervisor._hang_seconds = patience
