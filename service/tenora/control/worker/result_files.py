"""The files that a finished job leaves: its metrics, the table of its sweep, and a model that it trained whole."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenora.control.adapters.model_card import README_NAME
from tenora.control.files.files import RESULT_PURPOSE
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, read_owned
from tenora.control.jobs.rows import step_metrics
from tenora.control.jobs.sweeps import trials_csv
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import FileRow
from tenora.control.storage.object_store import Incoming, put, writing
from tenora.control.worker.log import metrics_csv
from tenora.training.methods.table import find_method

METRICS_NAME = "step_metrics.csv"
SWEEP_NAME = "sweep.csv"
MODEL_NAME = "model.tar"


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that lies on disk under its id already and awaits its row."""

    id: str
    tenant_id: str
    filename: str
    size: int
    sha256: str

    def row(self) -> FileRow:
        """The row that makes it a file of the tenant."""
        return FileRow(
            id=self.id,
            tenant_id=self.tenant_id,
            bytes=self.size,
            created_at=unix_now(),
            filename=self.filename,
            purpose=RESULT_PURPOSE,
            status="processed",
            sha256=self.sha256,
        )


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be downloaded.

    Attributes:
        directory: a Hugging Face directory; its files are packed as they are.
        readme: what is said of it, as README.md.
    """

    directory: str
    readme: str


async def write_results(context: JobContext, claim: Claim, model: Model | None = None) -> list[ResultFile]:
    """Write what the job's log and its sweep hold now, and the model. Without rows they are swept at the next start.

    Raises:
        LeaseLostError: the job is in other hands.
        StorageFullError: no room; nothing was kept.
    """
    async with context.database.read() as session:
        row = await read_owned(session, claim)
        trials, metrics = row.sweep_results, find_method(row.requested["method"]).metrics
        winner = next((trial["trial"] for trial in trials or () if trial["winner"]), None)
        lines = await step_metrics(session, claim.tenant_id, claim.job_id)
    contents = {METRICS_NAME: metrics_csv(lines, winner=winner, metrics=metrics)}
    if trials:
        contents[SWEEP_NAME] = trials_csv(trials)
    written: list[ResultFile] = []
    try:
        for filename, content in contents.items():
            file_id = new_id("file")
            found = await asyncio.to_thread(put, context.storage.objects, claim.tenant_id, file_id, [content])
            written.append(ResultFile(file_id, claim.tenant_id, filename, *found))
        if model is not None:
            written.append(await asyncio.to_thread(_pack, context, claim, model))
    except BaseException:
        await discard_results(context, written)
        raise
    return written


async def discard_results(context: JobContext, results: Sequence[ResultFile]) -> None:
    """Remove files that will get no row."""
    for result in results:
        await asyncio.to_thread(context.storage.objects.delete, result.tenant_id, result.id)


def _pack(context: JobContext, claim: Claim, model: Model) -> ResultFile:
    """The directory as a tar archive, which needs no second copy of it on its way to where files lie."""
    file_id, readme = new_id("file"), model.readme.encode()
    with writing(context.storage.objects) as incoming:
        with tarfile.open(mode="w|", fileobj=_Sink(incoming)) as archive:
            entry = tarfile.TarInfo(README_NAME)
            entry.size, entry.mode = len(readme), 0o644
            archive.addfile(entry, io.BytesIO(readme))
            for path in sorted(Path(model.directory).iterdir()):
                if path.name != README_NAME:
                    archive.add(path, path.name, filter=_plain)
        incoming.keep(claim.tenant_id, file_id)
        return ResultFile(file_id, claim.tenant_id, MODEL_NAME, incoming.size, incoming.sha256)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what this machine adds: equal models make equal archives."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime, entry.mode = 0, 0o644
    return entry


class _Sink(io.RawIOBase):
    """An object to be written as a file that an archive is written to."""

    def __init__(self, incoming: Incoming) -> None:
        super().__init__()
        self._incoming = incoming

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, content: Any) -> int:
        """Append."""
        self._incoming.write(bytes(content))
        return len(content)
