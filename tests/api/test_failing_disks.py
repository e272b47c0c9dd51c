"""A disk that is full, and one that gives back what was never written: what clients, probes and operators see."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from tenora.config import Settings
from tenora.control.control import Control
from tenora.control.registry import database
from tenora.control.registry.database import RegistryDamagedError
from tenora.engine.client.client import AsyncEngine
from tenora.errors import ConfigurationError
from tenora.model.catalog import resolve_model
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tests.api.conftest import TRAINING_ROWS, Service, import_adapter, upload
from tests.support.scripted_engine import Script, ScriptedEngine

PAGE = 4096


def fill(directory: Path) -> None:
    """Write until not another byte fits."""
    for size in (2**16, PAGE, 1):
        with contextlib.suppress(OSError), (directory / f"filler-{size}").open("ab", buffering=0) as file:
            while True:
                file.write(b"z" * size)
    with pytest.raises(OSError) as caught:
        (directory / "filler-last").write_bytes(b"z" * PAGE)
    assert caught.value.errno == errno.ENOSPC


def empty(directory: Path) -> None:
    """Remove what `fill` wrote."""
    for filler in directory.glob("filler-*"):
        filler.unlink()


class TestFull:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        """A disk of the test's own."""
        mount = tmp_path / "disk"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", mount]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        yield mount
        subprocess.run(["umount", "--lazy", mount], check=True)

    @pytest.fixture
    def settings(self, disk: Path) -> Settings:
        return Settings(home=disk / "home", device="cpu", dtype="float32", key_cache_seconds=0, threads=1)

    async def test_what_frees_space_works_on_a_full_disk_again_and_again(
        self, service: Service, disk: Path, make_adapter: Callable[..., Path]
    ) -> None:
        client = service.client()
        files = [(await upload(client, TRAINING_ROWS * 100)).json()["id"] for _ in range(3)]
        for seed in range(3):
            assert (await import_adapter(client, f"fox-{seed}", make_adapter(seed))).status_code == 201
        job = {"model": service.control.inference.base_id, "training_file": files[0]}
        jobs = [(await client.post("/v1/fine_tuning/jobs", json=job)).json()["id"] for _ in range(2)]
        for number in range(2):
            for path in (f"/v1/files/{files[number + 1]}", f"/v1/adapters/fox-{number}"):
                fill(disk)
                refused = await upload(client, TRAINING_ROWS * 100)
                assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
                deleted = await client.delete(path)
                assert deleted.status_code == 200, deleted.text
                assert (await client.get(path)).status_code == 404
            fill(disk)
            cancelled = await client.post(f"/v1/fine_tuning/jobs/{jobs[number]}/cancel")
            assert cancelled.status_code in {200, 409}, cancelled.text  # the full disk may have ended it before
        kept = {one["name"] for one in (await client.get("/v1/adapters")).json()["data"]}
        assert kept == {"fox-2"}

        empty(disk)
        assert (await upload(client)).status_code == 200
        assert (disk / "home" / "tenora.db-reserve").stat().st_blocks * 512 >= 2**20  # taken again


def damage(home: Path) -> None:
    """Write noise over every page of the database but the first."""
    with contextlib.closing(sqlite3.connect(home / "tenora.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (home / "tenora.db").open("r+b") as file:
        pages = os.fstat(file.fileno()).st_size // PAGE
        assert pages > 10
        for page in range(1, pages):
            file.seek(page * PAGE)
            file.write(os.urandom(PAGE))


async def test_a_page_that_is_damaged_while_the_service_runs_is_told(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    client, nobody = service.client(), service.client_with(None)
    assert (await client.get("/v1/files")).status_code == 200
    damage(service.settings.root)
    await service.control._registry.database._read.dispose()  # the connections remember pages that they have read
    answer = await client.get("/v1/files")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "registry_damaged")
    assert "backup" in answer.json()["error"]["message"]
    assert [record for record in caplog.records if record.message == "the registry is damaged"]
    ready = await nobody.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"status": "registry is damaged"})
    assert (await nobody.get("/livez")).status_code == 200  # a restart would not help


async def test_an_error_of_the_disk_that_passes_makes_no_server_unready_for_good(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "RECHECK_SECONDS", 0.01)
    failure = sqlite3.OperationalError("disk I/O error")
    failure.sqlite_errorcode, failure.sqlite_errorname = sqlite3.SQLITE_IOERR_WRITE, "SQLITE_IOERR_WRITE"
    registry = service.control._registry.database
    with pytest.raises(RegistryDamagedError):
        async with registry.read():
            raise OperationalError("INSERT", None, failure)
    assert not service.control.ready()
    while not service.control.ready():  # noqa: ASYNC110  # readiness tells nobody that it has changed
        await asyncio.sleep(0.01)


async def test_a_damaged_database_is_told_in_a_sentence_at_start(
    service: Service, tiny_base: Path, tmp_path: Path
) -> None:
    await upload(service.client())
    home = tmp_path / "copy"
    with contextlib.closing(sqlite3.connect(service.settings.root / "tenora.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    home.mkdir()
    shutil.copy(service.settings.root / "tenora.db", home)
    # One page of rows, which the migrations do not look at.
    with contextlib.closing(sqlite3.connect(home / "tenora.db")) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'files'").fetchone()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (home / "tenora.db").open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(os.urandom(PAGE))
    settings = Settings(home=home, device="cpu", dtype="float32", threads=1)
    engine = AsyncEngine.in_thread(settings, lambda wake: ScriptedEngine(Script(), wake))
    await engine.start()
    try:
        with pytest.raises(ConfigurationError, match=r"tenora\.db is damaged .* Restore it from a backup"):
            await Control.open(
                settings,
                engine,
                Tokenizer.load(tiny_base),
                resolve_model(str(tiny_base), settings.root),
                table_rows(ModelSpec.from_directory(tiny_base)),
            )
    finally:
        await engine.close(0)
