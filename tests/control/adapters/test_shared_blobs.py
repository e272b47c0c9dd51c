"""Adapters of two processes over one directory and one registry: none takes from the other what it is about to name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from tenora.adapters.store import AdapterStore
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.control.adapters.blobs import Blob, Blobs
from tenora.control.adapters.versions import NewVersion, add_version
from tenora.control.control import Control
from tenora.control.registry.database import Database
from tenora.control.tenancy.records import Principal
from tenora.engine.client.client import AsyncEngine
from tests.control.adapters.test_adapters import blobs
from tests.control.conftest import adapter_files

LATER = 2.0**40  # everything is older than that


@pytest.fixture
async def other(control: Control, home: Path, engine: AsyncEngine, base_rows: TableRows) -> AsyncIterator[Blobs]:
    """What another process has of the same adapters."""
    database = await Database.open(control.settings.database)
    yield Blobs(database, AdapterStore(home / "adapters"), engine, base_rows, 64)
    await database.close()


@pytest.fixture
def directory(tmp_path: Path, targets: Sequence[TargetModule]) -> str:
    """A PEFT directory, of an adapter that nobody has imported."""
    return str(adapter_files(tmp_path, targets)[1].parent)


async def name(control: Control, who: Principal, blob: Blob) -> None:
    """Commit a row that names it."""
    async with control._registry.database.write() as session:
        await add_version(session, NewVersion(who.tenant_id, "desk", "tiny", source="upload"), blob)


async def test_no_process_sweeps_old_content_that_another_publishes_again(
    control: Control, acme: Principal, other: Blobs, directory: str, home: Path
) -> None:
    stored = control._blobs.store.put(Path(directory))  # a process that is dead now had stored it
    async with control._blobs.publishing(directory) as blob:
        assert await other.sweep(LATER) == 0
        await name(control, acme, blob)
    assert await other.sweep(LATER) == 0
    assert blobs(home) == {stored}
    assert control._blobs.store.verify(stored)


async def test_no_process_deletes_what_another_publishes(
    control: Control, acme: Principal, other: Blobs, directory: str, home: Path
) -> None:
    async with control._blobs.publishing(directory) as blob:
        await other.release([blob.digest])
        assert blobs(home) == {blob.digest}
        await name(control, acme, blob)
    await other.release_postponed()
    assert blobs(home) == {blob.digest}


async def test_content_that_comes_while_its_deletion_finds_none_stays(
    control: Control, other: Blobs, directory: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third process has deleted it; the other publishes it anew after this one has looked for its lock."""
    store, real = control._blobs.store, AdapterStore.alone

    @contextlib.contextmanager
    def alone(self: AdapterStore, digest: str) -> Iterator[bool]:
        with real(self, digest) as found:
            holds.append(store.hold(store.put(Path(directory))))
            yield found

    digest = store.put(Path(directory))
    holds: list[int] = []
    store.delete(digest)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "alone", alone)
        await other.release([digest])
    assert blobs(home) == {digest}
    os.close(holds.pop())
    await other.release_postponed()
    assert blobs(home) == set()


async def test_content_that_was_not_named_after_all_goes_with_the_last_process_that_held_it(
    control: Control, other: Blobs, directory: str, home: Path
) -> None:
    async def fail(*processes: Blobs) -> None:
        """Publish in the first, and while it does so in the next; none of them comes to its row."""
        if not processes:
            return
        async with processes[0].publishing(directory):
            with contextlib.suppress(ZeroDivisionError):
                await fail(*processes[1:])
            assert len(blobs(home)) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail(control._blobs, other)
    assert blobs(home) == set()
    await other.release_postponed()
    assert other._postponed == set()


async def test_a_process_that_died_holds_nothing(control: Control, other: Blobs, directory: str, home: Path) -> None:
    digest = control._blobs.store.put(Path(directory))
    hold = control._blobs.store.hold(digest)
    await other.release([digest])
    assert blobs(home) == {digest}
    os.close(hold)  # as the kernel does when a process ends
    await other.release_postponed()
    assert blobs(home) == set()
