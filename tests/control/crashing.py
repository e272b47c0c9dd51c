"""A process that is killed at a failpoint: `python -m tests.control.crashing <home> <base> <point> <deed>`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import cast

from tenora.config import Settings
from tenora.control.control import Control
from tenora.control.records import JobRequest, Principal
from tenora.engine.client import AsyncEngine
from tenora.model.catalog import ResolvedModel
from tenora.model.spec import ModelSpec, target_modules
from tenora.model.tokenizer import Tokenizer
from tests.control.conftest import BASE, adapter_files, tenant, until, upload
from tests.control.scripted import ScriptedEngine


class Armed(Settings):
    """Settings with the failpoints that only tests set."""

    failpoints: str = ""


async def job(control: Control, who: Principal) -> None:
    file = await upload(control, who)
    made = await control.jobs.create(who, JobRequest(model=BASE, training_file=file.id, name="desk", seed=1))
    await until(control, who, made.id)
    await control.close()  # the work directory is removed behind the status


async def main(home: Path, base: Path, point: str, deed: str) -> None:
    targets = target_modules(ModelSpec.from_directory(base))
    settings = Armed(home=home, failpoints=f"{point}=kill" if point else "")
    control = await Control.open(
        settings,
        cast("AsyncEngine", ScriptedEngine(targets)),
        Tokenizer.load(base),
        ResolvedModel(base, BASE),
        targets,
    )
    await control.start()
    who = await tenant(control, "acme")
    if deed == "job":
        await job(control, who)
    elif deed == "upload":
        await upload(control, who)
    elif deed == "delete-file":
        (file,) = (await control.files.list(who)).items
        await control.files.delete(who, file.id)
    elif deed == "import":
        config, weights = adapter_files(home.parent, targets, seed=2)
        await control.adapters.import_(who, name="desk", config=config, weights=weights)
    elif deed == "delete-adapter":
        await control.adapters.delete(who, "desk")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
