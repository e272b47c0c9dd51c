"""Import, versions, rollback, pins, shared blobs, export, deletion, models."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.control.adapters.model_card import README_NAME
from tenora.control.control import Control
from tenora.control.tenancy.records import Principal
from tenora.control.tenancy.tenants import DEFAULT_TENANT
from tenora.engine import loop
from tenora.errors import (
    AdapterFormatError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
)
from tests.control.conftest import BASE, ImportAdapter, OpenControl, adapter_files, archive_of, tenant, until_true
from tests.support.scripted_jobs import JobScript


def blobs(home: Path) -> set[str]:
    return {path.name for path in (home / "adapters").glob("??/*")}


async def test_import(
    control: Control,
    acme: Principal,
    import_adapter: ImportAdapter,
    script: JobScript,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = await import_adapter(control, acme, "desk", rank=6)
    assert (record.name, record.tenant, record.version, record.active) == ("desk", "acme", 1, True)
    assert (record.rank, record.target_modules, record.method) == (6, ("q_proj", "v_proj"), "lora")
    assert (record.base_model, record.parent, record.source, record.job_id) == (BASE, BASE, "upload", None)
    assert (record.resident, record.pinned, record.evaluation) == ("disk", False, None)
    assert record.bytes > 0
    assert blobs(home) == {record.digest}
    assert await control.adapters.get(acme, "desk") == record
    assert await control.adapters.get(acme, "acme/desk") == record
    assert await control.adapters.list(acme) == [record]
    script.resident = (record.digest,)
    monkeypatch.setattr(loop, "HEARTBEAT_SECONDS", 0.0)
    script.wake()
    await until_true(lambda: control.engine.stats.adapters_resident == script.resident)
    assert (await control.adapters.get(acme, "desk")).resident == "device"
    assert list((home / "staging").iterdir()) == []


async def test_the_caller_keeps_its_files(
    control: Control, acme: Principal, tmp_path: Path, targets: Sequence[TargetModule]
) -> None:
    config, weights = adapter_files(tmp_path, targets)
    record = await control.adapters.import_(acme, name="desk", config=config, weights=str(weights))
    weights.chmod(0o600)
    weights.write_bytes(b"changed after the import")
    stored = await archive_of(control, acme, "desk")
    with zipfile.ZipFile(io.BytesIO(stored)) as file:
        assert file.read(WEIGHTS_NAME) != b"changed after the import"
    assert control._blobs.store.verify(record.digest)


async def test_refused_adapters_leave_nothing(
    control: Control, acme: Principal, tmp_path: Path, targets: Sequence[TargetModule], home: Path
) -> None:
    config, weights = adapter_files(tmp_path, targets)
    dora = json.dumps({**json.loads(config), "use_dora": True}).encode()
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x80\x04cposix\nsystem\n")
    for name, bad_config, bad_weights, error in (
        ("desk", dora, weights, AdapterFormatError),
        ("desk", b"{", weights, AdapterFormatError),
        ("desk", config, junk, AdapterFormatError),
        ("desk", b" " * (2**20 + 1), weights, PayloadTooLargeError),
        (BASE, config, weights, InvalidRequestError),
        ("a/b", config, weights, InvalidRequestError),
        ("..", config, weights, InvalidRequestError),
        ("", config, weights, InvalidRequestError),
    ):
        with pytest.raises(error):
            await control.adapters.import_(acme, name=name, config=bad_config, weights=str(bad_weights))
    assert await control.adapters.list(acme) == []
    assert blobs(home) == set()
    assert list((home / "staging").iterdir()) == []


async def test_too_large_an_adapter(open_control: OpenControl, import_adapter: ImportAdapter, home: Path) -> None:
    control = await open_control(max_adapter_bytes=1024)
    with pytest.raises(PayloadTooLargeError, match="1024"):
        await import_adapter(control, await tenant(control, "acme"), "desk")
    assert blobs(home) == set()


async def test_versions_and_rollback(control: Control, acme: Principal, import_adapter: ImportAdapter) -> None:
    first = await import_adapter(control, acme, "desk", seed=1)
    second = await import_adapter(control, acme, "desk", seed=2)
    third = await import_adapter(control, acme, "desk", seed=3)
    assert [one.version for one in (first, second, third)] == [1, 2, 3]
    assert (await import_adapter(control, acme, "desk", seed=3)) == third  # the same content again is no new version
    listed = await control.adapters.versions(acme, "desk")
    assert [(one.version, one.active) for one in listed] == [(3, True), (2, False), (1, False)]
    for wanted, digest in ((1, first.digest), ("2", second.digest), (third.digest[:8], third.digest)):
        back = await control.adapters.rollback(acme, "desk", wanted)
        assert (back.digest, back.active) == (digest, True)
        assert (await control.adapters.get(acme, "desk")).digest == digest
    await control.adapters.rollback(acme, "desk", 1)
    fourth = await import_adapter(control, acme, "desk", seed=4)
    assert (fourth.version, fourth.active) == (4, True)
    for missing in (9, "9", "0" * 8):
        with pytest.raises(NotFoundError):
            await control.adapters.rollback(acme, "desk", missing)
    for wrong in ("abc", "", "latest", "g" * 8):
        with pytest.raises(InvalidRequestError):
            await control.adapters.rollback(acme, "desk", wrong)


async def test_pins_follow_the_alias(
    open_control: OpenControl, import_adapter: ImportAdapter, script: JobScript
) -> None:
    control = await open_control()
    acme, umbrella = await tenant(control, "acme"), await tenant(control, "umbrella")
    first = await import_adapter(control, acme, "desk", seed=1)
    assert (await control.adapters.pin(acme, "desk", True)).pinned
    assert script.pinned == {first.digest: True}
    second = await import_adapter(control, acme, "desk", seed=2)
    assert second.pinned
    assert script.pinned == {first.digest: False, second.digest: True}
    await control.adapters.rollback(acme, "desk", 1)
    assert script.pinned == {first.digest: True, second.digest: False}
    # The same content pinned by another tenant stays pinned when one of the two lets go.
    await import_adapter(control, umbrella, "theirs", seed=1)
    await control.adapters.pin(umbrella, "theirs", True)
    await control.adapters.pin(acme, "desk", False)
    assert script.pinned[first.digest]
    await control.close()
    script.pins.clear()
    control = await open_control()
    assert script.pinned == {first.digest: True}
    await control.adapters.pin(umbrella, "theirs", False)
    assert script.pinned == {first.digest: False}


async def test_blobs_are_shared_and_freed_with_the_last_row(
    control: Control,
    acme: Principal,
    umbrella: Principal,
    import_adapter: ImportAdapter,
    script: JobScript,
    home: Path,
) -> None:
    ours = await import_adapter(control, acme, "desk", seed=1)
    theirs = await import_adapter(control, umbrella, "desk", seed=1)
    other = await import_adapter(control, acme, "other", seed=1)
    own = await import_adapter(control, acme, "desk", seed=2)
    assert ours.digest == theirs.digest == other.digest
    assert blobs(home) == {ours.digest, own.digest}
    await control.adapters.delete(acme, "desk")
    assert blobs(home) == {ours.digest}
    assert script.evicted == [own.digest]
    await control.adapters.delete(acme, "acme/other")
    assert (await control.adapters.get(umbrella, "desk")).digest == ours.digest
    assert (await control.inference.resolve(umbrella, "desk", None)).adapter is not None
    await control.adapters.delete(umbrella, "desk")
    assert blobs(home) == set()
    assert script.evicted == [own.digest, ours.digest]
    with pytest.raises(ModelNotFoundError):
        await control.inference.resolve(umbrella, "desk", None)
    again = await import_adapter(control, acme, "desk", seed=1)
    assert (again.version, again.digest) == (1, ours.digest)


async def test_the_archive_is_the_adapter(
    control: Control, acme: Principal, import_adapter: ImportAdapter, base_rows: TableRows, tmp_path: Path
) -> None:
    await import_adapter(control, acme, "desk", seed=5)
    archive = await archive_of(control, acme, "desk")
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert sorted(file.namelist()) == sorted([CONFIG_NAME, WEIGHTS_NAME, README_NAME])
        file.extractall(tmp_path / "out")
    got = read_adapter(tmp_path / "out", base_rows, max_rank=64)
    want = read_adapter(tmp_path / "adapter-5-4", base_rows, max_rank=64)
    for path, module in want.modules.items():
        assert np.array_equal(got.modules[path].a, module.a)
        assert np.array_equal(got.modules[path].b, module.b)
        assert got.modules[path].scaling == module.scaling


async def test_another_tenants_adapter_is_a_missing_one(
    control: Control, acme: Principal, umbrella: Principal, import_adapter: ImportAdapter
) -> None:
    await import_adapter(control, umbrella, "desk")
    for call in (
        control.adapters.get,
        control.adapters.versions,
        control.adapters.archive,
        control.adapters.delete,
        lambda who, name: control.adapters.rollback(who, name, 1),
        lambda who, name: control.adapters.pin(who, name, True),
    ):
        seen = set()
        for name in ("desk", "umbrella/desk", "none", "umbrella/none", "nobody/none"):
            with pytest.raises(NotFoundError) as caught:
                await call(acme, name)
            seen.add((caught.value.message.replace(repr(name), "?"), caught.value.code, caught.value.param))
        assert len(seen) == 1
    for look in (control.models.get, control.models.delete):
        said = set()
        for name in ("desk", "umbrella/desk", "none"):
            with pytest.raises(ModelNotFoundError) as missing:
                await look(acme, name)
            said.add(missing.value.message.replace(repr(name), "?"))
        assert len(said) == 1
    assert await control.adapters.list(acme) == []
    assert [card.id for card in await control.models.list(acme)] == [BASE]
    assert (await control.adapters.get(umbrella, "desk")).version == 1


async def test_models(control: Control, acme: Principal, import_adapter: ImportAdapter) -> None:
    record = await import_adapter(control, acme, "desk")
    base, desk = await control.models.list(acme)
    assert (base.id, base.parent, base.owned_by, base.max_model_len) == (BASE, None, "tenora", 256)
    assert (desk.id, desk.parent, desk.owned_by, desk.created) == ("desk", BASE, "acme", record.created_at)
    assert await control.models.get(acme, "desk") == desk
    assert (await control.models.get(acme, BASE)) == base
    for name in ("acme/desk", f"desk@{record.digest[:8]}"):
        assert (await control.models.get(acme, name)).id == name
    with pytest.raises(PermissionDeniedError) as caught:
        await control.models.delete(acme, BASE)
    assert caught.value.code == "base_model"
    await control.models.delete(acme, "acme/desk")
    assert [card.id for card in await control.models.list(acme)] == [BASE]


async def test_loading_by_path(
    open_control: OpenControl, import_adapter: ImportAdapter, tmp_path: Path, targets: Sequence[TargetModule]
) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    adapter_files(allowed, targets, seed=1)
    adapter_files(tmp_path, targets, seed=2)
    control = await open_control(adapter_dirs=(allowed,))
    acme = await tenant(control, DEFAULT_TENANT)
    good = allowed / "adapter-1-4"
    load = control.adapters.load_path
    record = await load(acme, name="desk", path=good, replace=False)
    assert record.version == 1
    with pytest.raises(InvalidRequestError) as caught:
        await load(acme, name="desk", path=good, replace=False)
    assert caught.value.code == "already_loaded"
    assert await load(acme, name="desk", path=good, replace=True) == record
    (allowed / "link").symlink_to(tmp_path / "adapter-2-4")
    (allowed / "half").mkdir()
    (allowed / "half" / CONFIG_NAME).symlink_to(good / CONFIG_NAME)
    (allowed / "half" / WEIGHTS_NAME).symlink_to(tmp_path / "adapter-2-4" / WEIGHTS_NAME)
    seen = set()
    for bad in (tmp_path / "adapter-2-4", good / ".." / ".." / "adapter-2-4", allowed / "link", tmp_path / "none"):
        with pytest.raises(PermissionDeniedError) as denied:
            await load(acme, name="desk2", path=bad, replace=False)
        seen.add(denied.value.message)
    assert len(seen) == 1
    with pytest.raises(AdapterFormatError):
        await load(acme, name="desk2", path=allowed / "half", replace=False)
    assert [one.name for one in await control.adapters.list(acme)] == ["desk"]


async def test_a_restart_keeps_adapters_and_sweeps_orphans(
    open_control: OpenControl, import_adapter: ImportAdapter, home: Path
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    first = await import_adapter(control, acme, "desk", seed=1)
    second = await import_adapter(control, acme, "desk", seed=2)
    await control.adapters.rollback(acme, "desk", 1)
    orphan = await import_adapter(control, acme, "gone", seed=3)
    path = control._blobs.store.path(orphan.digest)
    async with control._registry.database.write() as session:
        from sqlalchemy import delete

        from tenora.control.registry.tables import AdapterRow, AdapterVersionRow

        await session.execute(delete(AdapterVersionRow).where(AdapterVersionRow.digest == orphan.digest))
        await session.execute(delete(AdapterRow).where(AdapterRow.name == "gone"))
    await control.close()
    os.utime(path, (time.time() - 5, time.time() - 5))
    control = await open_control()
    assert blobs(home) == {first.digest, second.digest}
    assert (await control.adapters.get(acme, "desk")).digest == first.digest
    assert (await control.inference.resolve(acme, "desk", None)).adapter is not None


@pytest.mark.parametrize("version", [0, -1, 2**31, 2**64, 10**30])
async def test_a_version_of_any_number_is_there_or_not(
    control: Control, acme: Principal, import_adapter: ImportAdapter, version: int
) -> None:
    await import_adapter(control, acme, "desk", seed=1)
    with pytest.raises(NotFoundError, match="no version"):
        await control.adapters.rollback(acme, "desk", version)
