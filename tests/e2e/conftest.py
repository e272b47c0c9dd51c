"""Fixtures that start real servers. Tests share `server`, so they give what they make there names of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Server

StartServer = Callable[..., Server]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Server]:
    """A running server of the tiny base, in float32."""
    served = Server(tmp_path_factory.mktemp("served"), tiny_base, TENORA_DTYPE="float32")
    try:
        served.start()
        yield served
    finally:
        served.stop()


@pytest.fixture
def new_server(tmp_path: Path, tiny_base: Path) -> Iterator[StartServer]:
    """`new_server(**settings)` -> a server of the test's own, not yet started, and stopped at the test's end."""
    made: list[Server] = []

    def make(model: Path = tiny_base, **settings: str) -> Server:
        home = tmp_path / f"home-{len(made)}"
        home.mkdir()
        made.append(Server(home, model, TENORA_DTYPE="float32", **settings))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.stop()


@pytest.fixture(scope="session")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with a context long enough for an answer that takes seconds."""
    from tests.support.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("long"), max_position_embeddings=4096)
