"""A process that is killed at a failpoint: `python -m tests.control.crashing <home> <base> <point> <deed> <url>`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from tenora.config import Settings
from tenora.control.adapters.records import AdapterRecord
from tenora.control.control import Control
from tenora.control.files.records import FileRecord
from tenora.control.jobs.records import JobRecord, JobRequest
from tenora.control.tenancy.idempotency import Receipt, StoredAnswer
from tenora.control.tenancy.records import Principal
from tenora.model.catalog import ResolvedModel
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tests.control.conftest import BASE, adapter_files, tenant, until, upload
from tests.support.loop_link import in_loop
from tests.support.scripted_jobs import JobScript

WORSE = 1.5  # nats per token, where what the name means comes to 1
KEYED = ("POST /v1/things", "key", b"payload")  # route, key and payload of a request with an Idempotency-Key


class Armed(Settings):
    """Settings with the failpoints that only tests set."""

    failpoints: str = ""


async def job(control: Control, who: Principal) -> None:
    file = await upload(control, who)
    made = await control.jobs.create(who, JobRequest(model=BASE, training_file=file.id, name="desk", seed=1))
    await until(control, who, made.id)
    await control.close()  # the work directory is removed behind the status


async def keyed(control: Control, who: Principal, deed: str) -> None:
    """A use case whose answer is kept for repetitions; the answer is the id."""
    route, key, payload = KEYED
    if deed == "keyed-job":
        file = await upload(control, who)
    assert await control.idempotency.begin(who, route, key, payload) is None

    def answer(made: JobRecord | FileRecord | AdapterRecord) -> StoredAnswer:
        return StoredAnswer(200, made.id.encode())

    receipt: Receipt[Any] = control.idempotency.receipt(who, route, key, answer)
    if deed == "keyed-job":
        await control.jobs.create(who, JobRequest(model=BASE, training_file=file.id), receipt)
    elif deed == "keyed-upload":
        await upload(control, who, receipt=receipt)
    else:
        config, weights = adapter_files(control.settings.root.parent, control._blobs.rows.modules, seed=2)
        await control.adapters.import_(who, name="desk", config=config, weights=str(weights), receipt=receipt)


async def main(home: Path, base: Path, point: str, deed: str, registry_url: str | None) -> None:
    rows = table_rows(ModelSpec.from_directory(base))
    script = JobScript(rows.modules)
    if deed == "worse-job":
        script.loss = WORSE
    settings = Armed(home=home, database_url=registry_url, failpoints=f"{point}=kill" if point else "")
    engine = in_loop(settings, script)
    await engine.start()
    control = await Control.open(
        settings,
        engine,
        Tokenizer.load(base),
        ResolvedModel(base, BASE),
        rows,
    )
    await control.start()
    who = await tenant(control, "acme")
    if deed in {"job", "worse-job"}:
        await job(control, who)
    elif deed.startswith("keyed-"):
        await keyed(control, who, deed)
    elif deed == "upload":
        await upload(control, who)
    elif deed == "delete-file":
        (file,) = (await control.files.list(who)).items
        await control.files.delete(who, file.id)
    elif deed == "import":
        config, weights = adapter_files(home.parent, rows.modules, seed=2)
        await control.adapters.import_(who, name="desk", config=config, weights=str(weights))
    elif deed == "delete-adapter":
        await control.adapters.delete(who, "desk")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] or None))
