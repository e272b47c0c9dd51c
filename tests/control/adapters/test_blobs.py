"""Stored adapters: what is let in, how long it stays, and that damage is seen."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.numpy

from tenora.adapters.digest import WEIGHTS_NAME, damaged
from tenora.adapters.store import AdapterStore
from tenora.adapters.targets import TargetModule
from tenora.control.adapters import blobs as blobs_module
from tenora.control.adapters.versions import NewVersion, add_version
from tenora.control.control import Control
from tenora.control.jobs.records import JobRequest
from tenora.control.tenancy.records import Principal
from tenora.engine.messages import Generate
from tenora.errors import (
    AdapterDamagedError,
    AdapterFormatError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
)
from tests.control.adapters.test_adapters import blobs
from tests.control.conftest import (
    BASE,
    ImportAdapter,
    adapter_files,
    another_engine,
    archive_of,
    create_job,
    until,
    until_true,
    upload,
)
from tests.control.gate.test_takeover import train, warnings
from tests.support.patience import PATIENCE
from tests.support.scripted_answers import refusal, scores
from tests.support.scripted_engine import Answer
from tests.support.scripted_jobs import JobScript


def damage(home: Path, digest: str) -> None:
    """Flip one bit of one weight on the disk."""
    path = home / "adapters" / digest[:2] / digest / WEIGHTS_NAME
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)


async def test_an_adapter_that_could_never_be_served_is_refused_at_import(
    control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter, home: Path
) -> None:
    size = (await import_adapter(control, acme, "desk")).bytes
    await another_engine(control.engine, script, adapter_pool_bytes=size)
    await import_adapter(control, acme, "desk", seed=1)
    with pytest.raises(
        AdapterFormatError, match=f"all of the pool has {size}: it can never be served. Train"
    ) as caught:
        await import_adapter(control, acme, "large", rank=5)
    assert caught.value.code == "adapter_too_large"
    assert [one.name for one in await control.adapters.list(acme)] == ["desk"]
    assert len(blobs(home)) == 2


async def test_weights_that_the_compute_type_cannot_hold_are_refused_at_import(
    control: Control, acme: Principal, script: JobScript, tmp_path: Path, targets: Sequence[TargetModule]
) -> None:
    config, weights = adapter_files(tmp_path, targets)
    arrays = safetensors.numpy.load_file(weights)
    next(iter(arrays.values()))[0, 0] = 65520.0  # the smallest number that float16 rounds to infinity
    safetensors.numpy.save_file(arrays, weights)
    await control.adapters.import_(acme, name="desk", config=config, weights=str(weights))
    await another_engine(control.engine, script, dtype="float16")
    with pytest.raises(AdapterFormatError, match="holds 65520, which the type that this server computes in cannot"):
        await control.adapters.import_(acme, name="desk", config=config, weights=str(weights))


async def test_a_job_whose_adapter_could_never_be_served_is_refused(
    control: Control, acme: Principal, script: JobScript
) -> None:
    await another_engine(control.engine, script, adapter_pool_bytes=2**16)
    with pytest.raises(InvalidRequestError, match="it can never be served") as caught:
        await create_job(control, acme, lora={"rank": 64})
    assert (caught.value.param, caught.value.code) == ("lora.rank", "adapter_too_large")
    await create_job(control, acme, lora={"rank": 1, "target_modules": ["q_proj"]})


@pytest.mark.parametrize("ranks", [[1, 64], {"min": 1, "max": 64}])
async def test_a_sweep_over_ranks_that_could_never_be_served_is_refused_before_anything_is_stored(
    ranks: object, control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    await import_adapter(control, acme, "parent", rank=1)
    await another_engine(control.engine, script, adapter_pool_bytes=2**17)
    file = await upload(control, acme)
    for fields in {}, {"model": "parent"}:
        asked = {"model": BASE, "lora": {"target_modules": "all-linear"}, **fields}
        with pytest.raises(InvalidRequestError, match="it can never be served") as caught:
            await control.jobs.create(acme, JobRequest(training_file=file.id, sweep={"rank": ranks}, **asked))
        assert (caught.value.param, caught.value.code) == ("sweep.rank", "adapter_too_large")
    assert (await control.jobs.list(acme)).items == []
    job = await create_job(control, acme, sweep={"rank": [1, 2]})
    assert (await until(control, acme, job.id)).status == "succeeded"  # though the usual rank could not be served


async def test_a_deleted_version_stays_for_the_requests_that_were_accepted(
    control: Control, acme: Principal, import_adapter: ImportAdapter, script: JobScript, home: Path
) -> None:
    record = await import_adapter(control, acme, "desk", seed=1)
    with control._blobs.use(record.digest), control._blobs.use(record.digest):
        await control.adapters.delete(acme, "desk")
        assert blobs(home) == {record.digest}
        assert script.evicted == []
        with pytest.raises(ModelNotFoundError):
            await control.inference.resolve(acme, "desk", None)
    await control._blobs.settle()
    assert blobs(home) == set()
    assert script.evicted == [record.digest]
    with pytest.raises(NotFoundError), control._blobs.use(record.digest):
        pass


async def test_content_imported_again_while_an_old_request_ends_keeps_pin_and_cache(
    control: Control, acme: Principal, import_adapter: ImportAdapter, script: JobScript, home: Path
) -> None:
    record = await import_adapter(control, acme, "desk", seed=1)
    await control.adapters.pin(acme, "desk", True)
    with control._blobs.use(record.digest):
        await control.adapters.delete(acme, "desk")
        assert script.pinned == {record.digest: False}
        await import_adapter(control, acme, "again", seed=1)
        await control.adapters.pin(acme, "again", True)
    await control._blobs.settle()
    assert blobs(home) == {record.digest}
    assert (script.evicted, script.pinned) == ([], {record.digest: True})


async def test_content_that_is_imported_while_its_old_adapter_goes_stays(
    control: Control,
    acme: Principal,
    import_adapter: ImportAdapter,
    script: JobScript,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its row is committed after the deletion has looked for rows, and before it comes to this content."""
    digests = {(await import_adapter(control, acme, "desk", seed=seed)).digest for seed in range(2)}
    kept = list(digests)[-1]  # the set's order is the deletion's
    directory = home / "adapters" / kept[:2] / kept
    publishing = contextlib.AsyncExitStack()
    blob = await publishing.enter_async_context(control._blobs.publishing(directory))

    async def evict(digest: str) -> None:
        if digest != kept:
            async with control._registry.database.write() as session:
                await add_version(session, NewVersion(acme.tenant_id, "again", "tiny", source="upload"), blob)
            ends.append(asyncio.create_task(publishing.aclose()))
            await asyncio.sleep(0)  # it has begun

    ends: list[asyncio.Task[None]] = []
    monkeypatch.setattr(control.engine, "evict", evict)
    await control.adapters.delete(acme, "desk")
    await asyncio.gather(*ends)
    assert blobs(home) == {kept}
    await archive_of(control, acme, "again")


class SlowStore:
    """Storing that waits, the first time, for whoever lets it go on."""

    def __init__(self, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.stored: list[str] = []
        self._put = control._blobs.store.put
        monkeypatch.setattr(control._blobs.store, "put", self.put)

    def put(self, source: Path) -> str:
        if not self.begun.is_set():
            self.begun.set()
            assert self.may_end.wait(PATIENCE)
        self.stored.append(self._put(source))
        return self.stored[-1]


async def test_a_long_import_holds_up_no_other_and_no_deletion(
    control: Control,
    acme: Principal,
    umbrella: Principal,
    import_adapter: ImportAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await import_adapter(control, acme, "old", seed=3)
    slow = SlowStore(control, monkeypatch)
    long = asyncio.create_task(import_adapter(control, acme, "long", seed=1))
    await asyncio.to_thread(slow.begun.wait)
    async with asyncio.timeout(PATIENCE):
        short = await import_adapter(control, umbrella, "short", seed=2)
        await control.adapters.delete(acme, "old")
    assert control._blobs.store.list() == (short.digest,)
    slow.may_end.set()
    digest = (await long).digest
    assert set(control._blobs.store.list()) == {short.digest, digest}


async def test_an_import_that_is_left_stores_nothing(
    control: Control,
    acme: Principal,
    targets: Sequence[TargetModule],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the thread that stores it cannot be stopped, and has read the whole upload already."""
    slow = SlowStore(control, monkeypatch)
    config, weights = adapter_files(tmp_path, targets, seed=1)
    put = slow._put
    slow._put = lambda source: put(weights.parent)
    left = asyncio.create_task(control.adapters.import_(acme, name="left", config=config, weights=str(weights)))
    await asyncio.to_thread(slow.begun.wait)
    left.cancel()
    await asyncio.wait([left])
    assert left.cancelled()
    slow.may_end.set()
    await until_true(lambda: bool(slow.stored))
    await until_true(lambda: control._blobs.store.list() == ())
    assert await control.adapters.list(acme) == []
    assert list((home / "staging").iterdir()) == []


async def test_content_that_is_imported_in_the_middle_of_its_deletion_is_stored_anew(
    control: Control,
    acme: Principal,
    import_adapter: ImportAdapter,
    script: JobScript,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And whoever imports it waits for the end of the deletion, instead of trying over and over."""
    digest = (await import_adapter(control, acme, "desk", seed=1)).digest
    deleting, may_end = asyncio.Event(), asyncio.Event()

    async def evict(_: str) -> None:
        deleting.set()
        await may_end.wait()

    monkeypatch.setattr(control.engine, "evict", evict)
    slow = SlowStore(control, monkeypatch)
    slow.may_end.set()
    deletion = asyncio.create_task(control.adapters.delete(acme, "desk"))
    await deleting.wait()
    again = asyncio.create_task(import_adapter(control, acme, "again", seed=1))
    await until_true(lambda: bool(slow.stored))
    may_end.set()
    await asyncio.gather(deletion, again)
    assert slow.stored == [digest, digest]
    assert control._blobs.store.list() == (digest,)
    await archive_of(control, acme, "again")


async def test_shapes_of_versions_that_are_long_gone_are_forgotten(
    control: Control, acme: Principal, import_adapter: ImportAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs_module, "_KEPT_SHAPES", 2)
    digests = [(await import_adapter(control, acme, "desk", seed=seed)).digest for seed in range(4)]
    assert list(control._blobs._shapes) == digests[2:]
    assert await control._blobs.device_bytes(digests[0]) == await control._blobs.device_bytes(digests[3]) > 0
    assert len(control._blobs._shapes) == 2


async def test_damaged_weights_are_not_given_out(
    control: Control, acme: Principal, import_adapter: ImportAdapter, home: Path
) -> None:
    """Not as a download, a pin or the start of a job; and the same content imported again mends it."""
    record = await import_adapter(control, acme, "desk", seed=1)
    await import_adapter(control, acme, "other", seed=2)
    damage(home, record.digest)
    with pytest.raises(AdapterDamagedError, match=record.digest[:12]):
        await control.adapters.archive(acme, "desk")
    with pytest.raises(AdapterDamagedError):
        await control.adapters.pin(acme, "desk", True)
    assert not (await control.adapters.get(acme, "desk")).pinned
    job = await until(control, acme, (await create_job(control, acme, lora={"init_from": "desk"})).id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "adapter_damaged"
    await archive_of(control, acme, "other")
    assert list((home / "staging").iterdir()) == []
    await import_adapter(control, acme, "desk", seed=1)
    await archive_of(control, acme, "desk")


async def test_nobody_waits_for_the_check_of_a_pin(
    control: Control,
    acme: Principal,
    umbrella: Principal,
    import_adapter: ImportAdapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All bytes of an adapter are read for it, so others write to the registry meanwhile."""
    for seed in range(2):
        await import_adapter(control, acme, "desk", seed=seed)
    loop, real = asyncio.get_running_loop(), control._blobs.store.verify

    def verify(digest: str) -> bool:
        asyncio.run_coroutine_threadsafe(control.tenants.ensure(f"tenant-{len(checked)}"), loop).result(30)
        checked.append(digest)
        return real(digest)

    checked: list[str] = []
    monkeypatch.setattr(AdapterStore, "verify", lambda _, digest: verify(digest))
    assert (await control.adapters.pin(acme, "desk", True)).pinned
    assert (await control.adapters.rollback(acme, "desk", 1)).version == 1
    assert len(checked) == 2


async def test_a_damaged_version_keeps_its_name_and_the_log_says_how_to_move_it(
    control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    broken = await import_adapter(control, acme, "desk", seed=9)

    def score(request: Generate) -> Answer:
        if request.adapter is not None and request.adapter.digest == broken.digest:
            error = damaged(broken.digest)
            return refusal(request, str(error.code), error.message)
        return scores(request)

    script.score = score
    (warning,) = await warnings(control, acme, await train(control, acme))
    assert "version 1 could not be scored: The stored files" in warning
    assert 'POST /v1/adapters/desk/rollback {"version": 2}' in warning
    assert (await control.adapters.get(acme, "desk")).version == 1
