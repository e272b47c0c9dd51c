"""A control plane on a real database and directory, over the real client of a scripted engine; what tests put into it.

What asks for `registry_url` runs on SQLite and on Postgres: the files `ON_BOTH` always, the others on Postgres in
`make test-full` only. What only SQLite has is tested by tests marked `sqlite`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from tenora.adapters.table_rows import TableRows
from tenora.adapters.targets import TargetModule
from tenora.config import Settings
from tenora.control.adapters.records import AdapterRecord
from tenora.control.control import Control
from tenora.control.files.records import FileRecord
from tenora.control.jobs.records import JobRecord, JobRequest
from tenora.control.registry.tables import TERMINAL
from tenora.control.tenancy.idempotency import Receipt
from tenora.control.tenancy.records import Principal
from tenora.engine.client import supervisor
from tenora.engine.client.client import AsyncEngine
from tenora.model.catalog import ResolvedModel
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tenora.training.spec import LoraSpec
from tests.support.loop_link import in_loop
from tests.support.patience import PATIENCE
from tests.support.postgres import Postgres, running
from tests.support.scripted_jobs import JobScript, random_modules
from tests.support.state import migrate

BASE = "tiny"
ROWS = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]}
    for i in range(20)
]

MANY_ROWS = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]}
    for i in range(60)
]  # too many for the few-shot recipe


@pytest.fixture(scope="session")
def base_rows(tiny_base: Path) -> TableRows:
    return table_rows(ModelSpec.from_directory(tiny_base))


@pytest.fixture(scope="session")
def targets(base_rows: TableRows) -> Sequence[TargetModule]:
    return base_rows.modules


ON_BOTH = (
    "test_leases",
    "test_registry",
    "test_databases",
    "test_idempotency",
    "test_batches",
    "test_presence",
    "test_shared_blobs",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "registry_url" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("sqlite") is not None:
        kinds = [pytest.param("sqlite", id="")]
    else:
        both = metafunc.module.__name__.rpartition(".")[2] in ON_BOTH
        kinds = ["sqlite", pytest.param("postgres", marks=() if both else pytest.mark.full)]
    metafunc.parametrize("registry_url", kinds, indirect=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's Postgres, started when the first test asks for it."""
    with running() as cluster:
        yield cluster


@pytest.fixture
async def registry_url(request: pytest.FixtureRequest) -> str | None:
    """What TENORA_DATABASE_URL is in this test: None, which is SQLite in the state directory, or a fresh Postgres."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return None
    cluster: Postgres = request.getfixturevalue("postgres")
    return await cluster.database()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def script(targets: Sequence[TargetModule]) -> JobScript:
    """What the engine does, and what it was told."""
    return JobScript(targets)


@pytest.fixture
async def engine(home: Path, script: JobScript, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncEngine]:
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.001, 0.01))
    engine = in_loop(Settings(home=home), script)
    await engine.start()
    yield engine
    await engine.close(0)


async def without_engine(engine: AsyncEngine, script: JobScript) -> None:
    """The engine dies, and stays away until `script.come_back()`."""
    script.leave()
    await until_true(lambda: not engine.alive)


async def another_engine(engine: AsyncEngine, script: JobScript, **ready: Any) -> None:
    """The engine dies, and what takes its place is of another make."""
    await without_engine(engine, script)
    script.ready = msgspec.structs.replace(script.ready, **ready)
    script.come_back()
    await engine.wait_alive()


OpenControl = Callable[..., Awaitable[Control]]


@pytest.fixture
async def open_control(
    home: Path,
    registry_url: str | None,
    engine: AsyncEngine,
    tokenizer: Tokenizer,
    tiny_base: Path,
    base_rows: TableRows,
) -> AsyncIterator[OpenControl]:
    """`await open_control(**settings)`: a started control plane on `home`; closed at the end unless the test did."""
    opened: list[Control] = []

    async def make(**values: Any) -> Control:
        settings = Settings(home=home, database_url=registry_url, **values)
        if registry_url is None and not home.exists():  # noqa: ASYNC240 (the state of a directory)
            await migrate(settings)
        model = ResolvedModel(tiny_base, BASE)
        control = await Control.open(settings, engine, tokenizer, model, base_rows)
        await control.start()
        opened.append(control)
        close = control.close

        async def close_once() -> None:
            opened.remove(control)
            await close()

        control.close = close_once  # type: ignore[method-assign]  # so that the fixture knows
        return control

    yield make
    for control in opened:
        await control.close()


@pytest.fixture
async def control(open_control: OpenControl) -> Control:
    return await open_control()


async def tenant(control: Control, name: str, *scopes: str) -> Principal:
    """A tenant with a key of these scopes (default: admin)."""
    record = await control.tenants.ensure(name)
    _, secret = await control.keys.create(record.id, scopes or ["admin"])
    return await control.keys.authenticate(secret)


@pytest.fixture
async def acme(control: Control) -> Principal:
    return await tenant(control, "acme")


@pytest.fixture
async def umbrella(control: Control) -> Principal:
    return await tenant(control, "umbrella")


async def pieces(content: bytes, size: int = 7) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def upload(
    control: Control, who: Principal, rows: Sequence[Any] = ROWS, receipt: Receipt[FileRecord] | None = None
) -> FileRecord:
    return await control.files.create(
        who, filename="rows.jsonl", purpose="fine-tune", chunks=pieces(jsonl(rows)), receipt=receipt
    )


async def content_of(control: Control, who: Principal, file_id: str) -> bytes:
    """The bytes of a file."""
    return await asyncio.to_thread(Path(await control.files.content(who, file_id)).read_bytes)


async def archive_of(control: Control, who: Principal, name: str) -> bytes:
    """The zip of an adapter, which is sent and removed."""
    path = Path(await control.adapters.archive(who, name))
    content = await asyncio.to_thread(path.read_bytes)
    await asyncio.to_thread(path.unlink)
    return content


async def create_job(control: Control, who: Principal, **fields: Any) -> JobRecord:
    if "training_file" not in fields:
        fields["training_file"] = (await upload(control, who)).id
    return await control.jobs.create(who, JobRequest(model=BASE, **fields))


async def until(
    control: Control, who: Principal, job_id: str, *statuses: str, messages: Sequence[str] = ()
) -> JobRecord:
    """Wait until the job has one of `statuses` (default: any terminal one) and its log holds `messages`."""
    wanted = statuses or tuple(TERMINAL)
    async with asyncio.timeout(PATIENCE):
        while True:
            job = await control.jobs.get(who, job_id)
            said = [event.message for event in (await control.jobs.events(who, job_id, limit=1000)).items]
            if job.status in wanted and all(any(message in line for line in said) for message in messages):
                return job
            if job.status in TERMINAL and job.status not in wanted:
                raise AssertionError((job, said))
            await asyncio.sleep(0.01)


async def until_told(control: Control, who: Principal, job_id: str, told: Callable[[JobRecord], bool]) -> JobRecord:
    """The job as soon as it says so: what its run tells is written together, a little later."""
    async with asyncio.timeout(PATIENCE):
        while not told(job := await control.jobs.get(who, job_id)):  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(0.01)
    return job


def adapter_files(
    directory: Path, targets: Sequence[TargetModule], *, seed: int = 0, rank: int = 4
) -> tuple[bytes, Path]:
    """The two files of a random adapter: the configuration's bytes and the path of the weights."""
    lora = LoraSpec(rank=rank, alpha=8.0, target_modules=("q_proj", "v_proj"))
    path = directory / f"adapter-{seed}-{rank}"
    if not path.exists():
        modules = random_modules(targets, lora.target_modules, rank, seed)
        write_adapter(path, base_model="whatever", lora=lora, modules=modules)
    return (path / CONFIG_NAME).read_bytes(), path / WEIGHTS_NAME


async def until_true(condition: Callable[[], bool]) -> None:
    """Look until it holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(0.01)


async def messages(control: Control, who: Principal, job_id: str) -> list[str]:
    """A job's log, oldest first."""
    return [event.message for event in reversed((await control.jobs.events(who, job_id, limit=1000)).items)]


def workdir(home: Path, who: Principal, job_id: str) -> Path:
    return home / "tenants" / who.tenant_id / "jobs" / job_id


ImportAdapter = Callable[..., Awaitable[AdapterRecord]]


@pytest.fixture
def import_adapter(tmp_path: Path, targets: Sequence[TargetModule]) -> ImportAdapter:
    """`await import_adapter(control, who, name, seed=…)`."""

    async def do(control: Control, who: Principal, name: str, *, seed: int = 0, rank: int = 4) -> AdapterRecord:
        config, weights = adapter_files(tmp_path, targets, seed=seed, rank=rank)
        return await control.adapters.import_(who, name=name, config=config, weights=str(weights))

    return do
