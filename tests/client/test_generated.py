"""The synchronous client is the asynchronous one without what makes it asynchronous."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

BOTH = """
class AsyncThing:
    async def __aenter__(self) -> AsyncThing:
        async with self.lock:  # an async with
            return (await self.get()).bind(self)

    async def all(self, fetch: Callable[[str], Awaitable[list[int]]]) -> list[int]:
        if (await self.get()) is None:
            print(await fetch(""))
        return [one async for one in self.stream.aiter_bytes()]
"""
ONE = """
class Thing:
    def __enter__(self) -> Thing:
        with self.lock:  # an with
            return self.get().bind(self)

    def all(self, fetch: Callable[[str], list[int]]) -> list[int]:
        if self.get() is None:
            print(fetch(""))
        return [one for one in self.stream.iter_bytes()]
"""


@pytest.fixture
def unasync(repo_root: Path) -> ModuleType:
    path = repo_root / "clients/python/scripts/unasync.py"
    spec = importlib.util.spec_from_file_location("unasync", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(unasync: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unasync", *arguments])
    result: int = unasync.main()
    return result


def test_tokens_are_replaced_and_nothing_else(unasync: ModuleType) -> None:
    assert unasync.synchronous(BOTH) == ONE
    assert unasync.synchronous(ONE) == ONE


def test_the_synchronous_client_is_fresh(unasync: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(unasync, monkeypatch, "--check") == 0, "run `make client`"
    names = {path.name.removeprefix("async_") for path in unasync.PACKAGE.glob("async_*.py")}
    assert names == {"admin.py", "client.py", "connection.py", "jobs.py", "paging.py", "resources.py", "streams.py"}


def test_a_change_of_either_side_is_noticed_and_mended(
    unasync: ModuleType, tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tenora_client"
    shutil.copytree(unasync.PACKAGE, package)
    shutil.copy(repo_root / "pyproject.toml", tmp_path)
    monkeypatch.setattr(unasync, "PACKAGE", package)
    assert run(unasync, monkeypatch, "--check") == 0
    source, made = package / "async_paging.py", package / "paging.py"
    source.write_text(source.read_text() + "\nMORE = 1\n")
    assert run(unasync, monkeypatch, "--check") == 1
    assert run(unasync, monkeypatch) == 0
    assert made.read_text().endswith("MORE = 1\n")
    made.write_text(made.read_text() + "OTHER = 2\n")
    assert run(unasync, monkeypatch, "--check") == 1
