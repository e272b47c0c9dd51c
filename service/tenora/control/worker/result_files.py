"""The files that a finished job leaves: its metrics, and the table of its sweep."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tenora.control.files.files import RESULT_PURPOSE
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, read_owned
from tenora.control.jobs.rows import step_metrics
from tenora.control.jobs.sweeps import trials_csv
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import FileRow
from tenora.control.storage.object_store import put
from tenora.control.worker.log import metrics_csv
from tenora.training.methods.table import find_method

METRICS_NAME = "step_metrics.csv"
SWEEP_NAME = "sweep.csv"


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that lies on disk under its id already and awaits its row."""

    id: str
    tenant_id: str
    filename: str
    content: bytes

    def row(self) -> FileRow:
        """The row that makes it a file of the tenant."""
        return FileRow(
            id=self.id,
            tenant_id=self.tenant_id,
            bytes=len(self.content),
            created_at=unix_now(),
            filename=self.filename,
            purpose=RESULT_PURPOSE,
            status="processed",
            sha256=hashlib.sha256(self.content).hexdigest(),
        )


async def write_results(context: JobContext, claim: Claim) -> list[ResultFile]:
    """Write what the job's log and its sweep hold now. Without rows they are swept at the next start.

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
            await asyncio.to_thread(put, context.storage.objects, claim.tenant_id, file_id, [content])
            written.append(ResultFile(file_id, claim.tenant_id, filename, content))
    except BaseException:
        await discard_results(context, written)
        raise
    return written


async def discard_results(context: JobContext, results: Sequence[ResultFile]) -> None:
    """Remove files that will get no row."""
    for result in results:
        await asyncio.to_thread(context.storage.objects.delete, result.tenant_id, result.id)
