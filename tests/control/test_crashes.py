"""kill -9 at every failpoint: after a restart everything is old or new, nothing half, and jobs go on."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tenora.control.control import Control
from tenora.control.storage import failpoints
from tenora.control.storage.failpoints import Failpoints, InjectedError
from tenora.control.tenancy.idempotency import StoredAnswer
from tenora.control.tenancy.records import Principal
from tenora.engine.client.client import AsyncEngine
from tenora.errors import ConfigurationError, NotFoundError
from tests.control.conftest import (
    ImportAdapter,
    OpenControl,
    content_of,
    create_job,
    tenant,
    until,
    upload,
    without_engine,
)
from tests.control.crashing import KEYED, WORSE
from tests.support.full import full_but
from tests.support.patience import PATIENCE
from tests.support.scripted_jobs import JobScript

JOB_POINTS = sorted(point for point in failpoints.POINTS if point.startswith(("jobs.", "publish.")))


KilledAt = Callable[[str, str], Awaitable[None]]


@pytest.fixture
def killed_at(home: Path, registry_url: str | None, tiny_base: Path, repo_root: Path) -> KilledAt:
    """`await killed_at(point, deed)`: a process on this registry that was killed at that failpoint."""

    async def kill(point: str, deed: str) -> None:
        program = [sys.executable, "-m", "tests.control.crashing"]
        process = await asyncio.create_subprocess_exec(
            *(*program, str(home), str(tiny_base), point, deed, registry_url or ""),
            cwd=repo_root,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == -signal.SIGKILL, output.decode()

    return kill


def names(home: Path, pattern: str) -> set[str]:
    return {path.name for path in home.glob(pattern)}


async def check_whole(control: Control, who: Principal, home: Path) -> None:
    """Every row has its blob, whole; every blob has its row; nothing is half-written."""
    files = (await control.files.list(who)).items
    assert names(home, "tenants/*/files/*") == {one.id for one in files}
    for one in files:
        assert len(await content_of(control, who, one.id)) == one.bytes
    digests = set()
    for adapter in await control.adapters.list(who):
        for version in await control.adapters.versions(who, adapter.name):
            digests.add(version.digest)
        assert (await control.inference.resolve(who, adapter.name, None)).adapter is not None
    for job in (await control.jobs.list(who)).items:
        for checkpoint in (await control.jobs.checkpoints(who, job.id)).items:
            target = await control.inference.resolve(who, checkpoint.fine_tuned_model_checkpoint, None)
            assert target.adapter is not None
            digests.add(target.adapter.digest)
    store = control._blobs.store
    assert set(store.list()) == digests
    assert all(store.verify(digest) for digest in digests)
    assert names(home, "staging/*") == set()


@pytest.mark.parametrize("point", full_but(["publish.after_blob", "publish.after_commit"], JOB_POINTS))
async def test_killed_in_a_job(
    open_control: OpenControl,
    import_adapter: ImportAdapter,
    engine: AsyncEngine,
    script: JobScript,
    home: Path,
    killed_at: KilledAt,
    point: str,
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    old = await import_adapter(control, acme, "desk", seed=9)
    await control.close()
    await killed_at(point, "job")

    await without_engine(engine, script)  # the registry as the crash left it, before the job can go on
    control = await open_control()
    (job,) = (await control.jobs.list(acme)).items
    await check_whole(control, acme, home)
    versions = await control.adapters.versions(acme, "desk")
    if point == "publish.after_commit":
        assert (job.status, [one.version for one in versions]) == ("succeeded", [2, 1])
    else:
        assert job.status in {"validating_files", "queued", "running"}
        assert [one.digest for one in versions] == [old.digest]
        assert job.fine_tuned_model is None
        assert job.result_files == ()
    script.come_back()
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    versions = await control.adapters.versions(acme, "desk")
    assert [(one.version, one.active) for one in versions] == [(2, True), (1, False)]
    assert versions[0].job_id == job.id
    await control.close()
    control = await open_control()
    assert names(home, "tenants/*/jobs/*") == set()
    await check_whole(control, acme, home)


@pytest.mark.parametrize(
    "point", full_but("publish.before_commit", ["publish.before_blob", "publish.before_commit", "publish.after_commit"])
)
async def test_killed_while_a_worse_result_is_withheld(
    open_control: OpenControl,
    import_adapter: ImportAdapter,
    engine: AsyncEngine,
    script: JobScript,
    home: Path,
    killed_at: KilledAt,
    point: str,
) -> None:
    """The name never means it, before the crash, after it or at the end; the version is stored once."""
    control = await open_control()
    acme = await tenant(control, "acme")
    old = await import_adapter(control, acme, "desk", seed=9)
    await control.close()
    await killed_at(point, "worse-job")

    script.loss = WORSE
    await without_engine(engine, script)
    control = await open_control()
    (job,) = (await control.jobs.list(acme)).items
    await check_whole(control, acme, home)
    assert (await control.adapters.get(acme, "desk")).digest == old.digest
    assert (job.published is None) == (point != "publish.after_commit")
    script.come_back()
    done = await until(control, acme, job.id)
    assert (done.status, done.published and done.published["code"]) == ("succeeded", "not_better")
    versions = await control.adapters.versions(acme, "desk")
    assert [(one.version, one.active) for one in versions] == [(2, False), (1, True)]
    said = [event.message for event in (await control.jobs.events(acme, job.id, limit=100)).items]
    assert sum("desk still means version 1" in line for line in said) == 1
    assert (await control.adapters.rollback(acme, "desk", 2)).job_id == job.id
    await check_whole(control, acme, home)


@pytest.mark.parametrize("point", ["files.before_rename", "files.after_rename"])
async def test_killed_in_an_upload(open_control: OpenControl, home: Path, killed_at: KilledAt, point: str) -> None:
    await killed_at(point, "upload")
    control = await open_control()
    acme = await tenant(control, "acme")
    assert (await control.files.list(acme)).items == []
    await check_whole(control, acme, home)


async def test_killed_in_deleting_a_file(open_control: OpenControl, home: Path, killed_at: KilledAt) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    await upload(control, acme)
    await control.close()
    await killed_at("files.after_delete", "delete-file")
    control = await open_control()
    await check_whole(control, acme, home)
    assert (await control.files.list(acme)).items == []


async def test_killed_in_an_import_and_in_a_deletion(
    open_control: OpenControl, import_adapter: ImportAdapter, home: Path, killed_at: KilledAt
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    old = await import_adapter(control, acme, "desk", seed=9)
    await control.close()
    await killed_at("adapters.after_blob", "import")
    control = await open_control()
    await check_whole(control, acme, home)
    assert [one.digest for one in await control.adapters.versions(acme, "desk")] == [old.digest]
    await control.close()
    await killed_at("adapters.after_delete", "delete-adapter")
    control = await open_control()
    await check_whole(control, acme, home)
    with pytest.raises(NotFoundError):
        await control.adapters.get(acme, "desk")


@pytest.mark.parametrize(
    ("deed", "point"),
    [
        ("keyed-job", "jobs.after_create"),
        ("keyed-upload", "files.after_create"),
        ("keyed-import", "adapters.after_create"),
    ],
)
async def test_killed_before_a_keyed_request_was_answered(
    open_control: OpenControl, home: Path, killed_at: KilledAt, deed: str, point: str
) -> None:
    """The client repeats the request with its Idempotency-Key: it must get the thing that exists, not a second one."""
    await killed_at(point, deed)
    control = await open_control()
    acme = await tenant(control, "acme")
    made = {
        "keyed-job": [one.id for one in (await control.jobs.list(acme)).items],
        "keyed-upload": [one.id for one in (await control.files.list(acme)).items],
        "keyed-import": [one.id for one in await control.adapters.list(acme)],
    }[deed]
    assert len(made) == 1
    assert await control.idempotency.begin(acme, *KEYED) == StoredAnswer(200, made[0].encode())


async def test_killed_before_a_keyed_upload_was_stored(
    open_control: OpenControl, home: Path, killed_at: KilledAt
) -> None:
    await killed_at("files.after_rename", "keyed-upload")
    control = await open_control()
    acme = await tenant(control, "acme")
    assert (await control.files.list(acme)).items == []
    assert await control.idempotency.begin(acme, *KEYED) is None  # nothing was done, so nothing is replayed


@pytest.mark.parametrize("point", ["publish.after_blob", "publish.after_result_file", "publish.before_commit"])
async def test_an_error_in_the_middle_publishes_nothing(
    control: Control, acme: Principal, home: Path, point: str
) -> None:
    """The process lives on: it must clean up itself, and the job says that it failed."""
    control._runner._context.failpoints.armed = {point: "error"}
    job = await until(control, acme, (await create_job(control, acme, name="desk")).id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == InjectedError.code
    assert await control.adapters.list(acme) == []
    await check_whole(control, acme, home)


def test_failpoints_are_named() -> None:
    assert Failpoints.parse("").armed == {}
    assert Failpoints.parse("publish.after_blob=kill, files.after_rename=error").armed == {
        "publish.after_blob": "kill",
        "files.after_rename": "error",
    }
    for wrong in ("publish.someday=kill", "publish.after_blob=explode", "publish.after_blob"):
        with pytest.raises(ConfigurationError):
            Failpoints.parse(wrong)


def test_every_failpoint_is_hit_somewhere() -> None:
    root = Path(failpoints.__file__).parents[1]
    source = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "failpoints.py")
    assert {point for point in failpoints.POINTS if f'hit("{point}")' not in source} == set()
