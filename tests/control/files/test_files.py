"""Uploads: streamed, checked, listed, deleted, swept."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tenora.control.control import Control
from tenora.control.files import files
from tenora.control.storage import directory
from tenora.control.tenancy.records import Principal
from tenora.data.reading import ValidationReport
from tenora.errors import (
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    StorageFullError,
)
from tests.control.conftest import ROWS, OpenControl, content_of, jsonl, pieces, tenant, upload
from tests.support.patience import PATIENCE


def everything_in(home: Path) -> list[Path]:
    return [path for name in ("staging", "tenants") for path in (home / name).rglob("*") if path.is_file()]


async def test_a_training_file_is_stored_and_checked(control: Control, acme: Principal) -> None:
    record = await upload(control, acme)
    content = jsonl(ROWS)
    assert (record.status, record.status_details, record.purpose) == ("processed", None, "fine-tune")
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert record.id.startswith("file-")
    assert await control.files.get(acme, record.id) == record
    assert await content_of(control, acme, record.id) == content


async def test_unusable_rows_are_named_by_line(control: Control, acme: Principal) -> None:
    record = await control.files.create(
        acme,
        filename="x.jsonl",
        purpose="fine-tune",
        chunks=pieces(jsonl([ROWS[0]]) + b"{nonsense\n" + jsonl([ROWS[1]])),
    )
    assert record.status == "error"
    assert record.status_details is not None
    assert "line 2" in record.status_details
    assert "bad_json" in record.status_details


async def test_a_table_is_a_training_file_too_whatever_it_is_called(control: Control, acme: Principal) -> None:
    record = await control.files.create(
        acme, filename="x.jsonl", purpose="fine-tune", chunks=pieces(b'id,prompt,completion\n1,"a, b",c\n2,d,e\n')
    )
    assert (record.status, record.status_details) == ("processed", None)
    record = await control.files.create(
        acme, filename="x.csv", purpose="fine-tune", chunks=pieces(b"prompt,answer\na,b\n")
    )
    assert record.status == "error"
    assert "`completion` (prompt and completion)" in str(record.status_details)


async def test_other_purposes_are_not_read(control: Control, acme: Principal) -> None:
    record = await control.files.create(acme, filename="a.bin", purpose="user_data", chunks=pieces(b"\x00\xff"))
    assert record.status == "uploaded"


@pytest.mark.parametrize("purpose", ["", "fine-tune-results", "finetune"])
async def test_unknown_purposes_are_refused(control: Control, acme: Principal, purpose: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await control.files.create(acme, filename="a", purpose=purpose, chunks=pieces(b"x"))
    assert caught.value.param == "purpose"


async def test_nothing_is_left_of_a_refused_upload(open_control: OpenControl, home: Path) -> None:
    control = await open_control(max_file_bytes=1024)
    acme = await tenant(control, "acme")

    async def broken() -> AsyncIterator[bytes]:
        yield b"some bytes"
        raise ConnectionResetError

    for chunks, error in (
        (pieces(b"x" * 1025), PayloadTooLargeError),
        (pieces(b""), InvalidRequestError),
        (broken(), ConnectionResetError),
    ):
        with pytest.raises(error):
            await control.files.create(acme, filename="a", purpose="user_data", chunks=chunks)
        assert everything_in(home) == []
    assert (await control.files.list(acme)).items == []
    exact = await control.files.create(acme, filename="a", purpose="user_data", chunks=pieces(b"x" * 1024))
    assert exact.bytes == 1024


async def test_a_full_disk_is_said_and_leaves_nothing(
    control: Control, acme: Principal, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tenora.control.storage.directory.os.write", full)
    with pytest.raises(StorageFullError):
        await control.files.create(acme, filename="a", purpose="user_data", chunks=pieces(b"x"))
    monkeypatch.undo()
    assert everything_in(home) == []


async def test_an_upload_that_is_cancelled_leaves_nothing(control: Control, acme: Principal, home: Path) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"half"
        begun.set()
        await never.wait()
        yield b"never"

    task = asyncio.create_task(control.files.create(acme, filename="a", purpose="user_data", chunks=slow()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert everything_in(home) == []


@pytest.mark.parametrize("filename", ["../../etc/passwd", "C:\\secret\\passwd", "/passwd", "passwd"])
async def test_a_file_name_is_a_label_only(control: Control, acme: Principal, home: Path, filename: str) -> None:
    record = await control.files.create(acme, filename=filename, purpose="user_data", chunks=pieces(b"x"))
    assert record.filename == "passwd"
    assert everything_in(home) == [home / "tenants" / acme.tenant_id / "files" / record.id]


@pytest.mark.parametrize("filename", ["", "..//", "a\nb", "a\x00b", "a" * 256])
async def test_file_names_that_cannot_be_shown(control: Control, acme: Principal, filename: str) -> None:
    with pytest.raises(InvalidRequestError):
        await control.files.create(acme, filename=filename, purpose="user_data", chunks=pieces(b"x"))


async def test_listing_in_pages(control: Control, acme: Principal) -> None:
    made = [(await upload(control, acme)).id for _ in range(5)]  # within one second: order does not come from time
    other = await control.files.create(acme, filename="a", purpose="user_data", chunks=pieces(b"x"))
    newest = [other.id, *reversed(made)]
    assert [one.id for one in (await control.files.list(acme)).items] == newest
    assert [one.id for one in (await control.files.list(acme, order="asc")).items] == newest[::-1]
    assert [one.id for one in (await control.files.list(acme, purpose="user_data")).items] == [other.id]
    walked: list[str] = []
    after = None
    while True:
        page = await control.files.list(acme, after=after, limit=2)
        walked += [one.id for one in page.items]
        if not page.has_more:
            break
        after = walked[-1]
    assert walked == newest
    ascending = await control.files.list(acme, order="asc", after=made[1], limit=2)
    assert ([one.id for one in ascending.items], ascending.has_more) == (made[2:4], True)
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"after": "file-none"}, {"order": "up"}):
        with pytest.raises(InvalidRequestError):
            await control.files.list(acme, **wrong)


async def test_another_tenants_file_is_a_missing_one(control: Control, acme: Principal, umbrella: Principal) -> None:
    theirs = (await upload(control, umbrella)).id
    assert (await control.files.list(acme)).items == []
    for call in (control.files.get, control.files.delete, control.files.content):
        errors = []
        for file_id in (theirs, "file-" + "0" * 24):
            with pytest.raises(NotFoundError) as caught:
                await call(acme, file_id)
            errors.append((caught.value.message.replace(file_id, "?"), caught.value.code, caught.value.param))
        assert errors[0] == errors[1]
    said = set()
    for file_id in (theirs, "file-" + "0" * 24):
        with pytest.raises(InvalidRequestError) as invalid:
            await control.files.list(acme, after=file_id)
        said.add(invalid.value.message.replace(file_id, "?"))
    assert len(said) == 1
    assert await content_of(control, umbrella, theirs)


async def test_delete_frees_the_disk(control: Control, acme: Principal, home: Path) -> None:
    record = await upload(control, acme)
    await control.files.delete(acme, record.id)
    assert everything_in(home) == []
    with pytest.raises(NotFoundError):
        await control.files.get(acme, record.id)


async def test_expiry(control: Control, acme: Principal, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = await upload(control, acme)
    record = await control.files.create(
        acme, filename="a", purpose="user_data", chunks=pieces(b"x"), expires_after=3600
    )
    assert record.expires_at == record.created_at + 3600
    assert await control.files.delete_expired() == 0
    later = time.time() + 3601
    monkeypatch.setattr("time.time", lambda: later)
    with pytest.raises(NotFoundError):
        await control.files.get(acme, record.id)
    assert [one.id for one in (await control.files.list(acme)).items] == [kept.id]
    assert await control.files.delete_expired() == 1
    assert [path.name for path in everything_in(home)] == [kept.id]
    for wrong in (0, 3599, 30 * 24 * 3600 + 1):
        with pytest.raises(InvalidRequestError, match="expires_after"):
            await control.files.create(
                acme, filename="a", purpose="user_data", chunks=pieces(b"x"), expires_after=wrong
            )


async def test_a_restart_keeps_files_and_sweeps_leftovers(open_control: OpenControl, home: Path) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    record = await upload(control, acme)
    path = Path(await control.files.content(acme, record.id))
    await control.close()
    orphan = path.with_name("file-orphan")
    orphan.write_bytes(b"no row names me")
    staged = home / "staging" / "half"
    staged.write_bytes(b"half")
    directory = home / "staging" / "half-a-directory"
    (directory / "inner").mkdir(parents=True)
    for old in (orphan, staged, directory):
        os.utime(old, (time.time() - 5, time.time() - 5))
    future = home / "staging" / "of-another-process"
    future.write_bytes(b"younger than the start")
    os.utime(future, (time.time() + 100, time.time() + 100))
    control = await open_control()
    assert everything_in(home) == [future, path] or everything_in(home) == [path, future]
    assert not directory.exists()
    assert await control.files.get(acme, record.id) == record


async def test_the_checks_of_a_tenants_files_hold_up_nobody_else(
    control: Control, acme: Principal, umbrella: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many it sends: neither what runs on the common threads nor another tenant's file."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    long, may, real = jsonl(ROWS * 2), threading.Event(), files.validate_file
    running = list[int]()

    def validate(path: Path, *args: Any, **options: Any) -> ValidationReport:
        if path.stat().st_size == len(long):
            running.append(1)
            may.wait(PATIENCE)
        return real(path, *args, **options)

    monkeypatch.setattr(files, "validate_file", validate)
    uploads = [asyncio.create_task(upload(control, acme, ROWS * 2)) for _ in range(3)]
    assert (await upload(control, umbrella)).status == "processed"
    assert await asyncio.to_thread(lambda: not may.is_set())
    assert len(running) <= 1
    may.set()
    assert [record.status for record in await asyncio.gather(*uploads)] == ["processed"] * 3


async def test_a_file_that_is_about_to_be_listed_is_listed_though_its_client_leaves(
    control: Control, acme: Principal, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Nobody removes the file of a row that was committed: there is no doubt whether it was."""
    begun, may_end = threading.Event(), threading.Event()
    place = directory.place

    def place_slowly(*paths: Path) -> None:
        begun.set()
        assert may_end.wait(PATIENCE)
        place(*paths)

    monkeypatch.setattr(directory, "place", place_slowly)
    uploading = asyncio.create_task(upload(control, acme))
    await asyncio.to_thread(begun.wait)
    for _ in range(2):
        uploading.cancel()
        await asyncio.sleep(0)
    may_end.set()
    await asyncio.wait([uploading])
    assert uploading.cancelled()
    (record,) = (await control.files.list(acme)).items
    assert await content_of(control, acme, record.id) == jsonl(ROWS)
    assert len(everything_in(home)) == 1
