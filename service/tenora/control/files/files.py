"""Uploaded files: streamed to disk, checked, listed, deleted.

An upload is written to staging, checked, given its name, and only then recorded in one transaction. A crash at any
point leaves either a whole file that is listed or a leftover that the next start sweeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tenora.config import Settings
from tenora.control.files.records import FileRecord
from tenora.control.files.rows import all_files, expired_files, files_of, find_file, unfinished_user
from tenora.control.registry.database import Database, Session
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.paging import Order, Page, page
from tenora.control.registry.tables import FileRow
from tenora.control.storage.directory import Storage
from tenora.control.storage.failpoints import Failpoints
from tenora.control.storage.object_store import Incoming
from tenora.control.tenancy.erasure import AfterCommit
from tenora.control.tenancy.idempotency import Receipt
from tenora.control.tenancy.records import Principal
from tenora.control.tokenizing.threads import Tokenizing
from tenora.data.dataset import validate_file
from tenora.data.reading import ValidationReport
from tenora.errors import ConflictError, InvalidRequestError, PayloadTooLargeError
from tenora.uninterrupted import to_its_end

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

TRAINING_PURPOSE = "fine-tune"
RESULT_PURPOSE = "fine-tune-results"
UPLOAD_PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
SHORTEST_LIFE = 3600
LONGEST_LIFE = 30 * 24 * 3600
_WRITE_BYTES = 1 << 20

Status = Literal["uploaded", "processed", "error"]


class Files:
    """The files of a tenant."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        tokenizing: Tokenizing,
        failpoints: Failpoints,
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._tokenizing = tokenizing
        self._failpoints = failpoints

    async def create(
        self,
        principal: Principal,
        *,
        filename: str,
        purpose: str,
        chunks: AsyncIterator[bytes],
        expires_after: int | None = None,
        receipt: Receipt[FileRecord] | None = None,
    ) -> FileRecord:
        """Store an upload; memory does not grow with it.

        A training file is checked before this returns: its status is `processed`, or `error` with `status_details`
        naming lines. Files of other purposes are `uploaded`.

        Args:
            filename: kept as a label; no path is made from it.
            expires_after: seconds until the file goes away by itself, 1 hour to 30 days; None keeps it.
            receipt: keeps the answer together with the file.

        Raises:
            InvalidRequestError: an unknown purpose, an empty file, a lifetime out of bounds.
            PayloadTooLargeError: more than `max_file_bytes`.
            StorageFullError: no room; nothing was kept.
            RateLimitedError: too many of the tenant's files wait for their check.
        """
        label = check_filename(filename)
        if purpose not in UPLOAD_PURPOSES:
            raise InvalidRequestError(
                f"purpose must be one of {', '.join(UPLOAD_PURPOSES)}; send fine-tune for training data.",
                param="purpose",
            )
        if expires_after is not None and not SHORTEST_LIFE <= expires_after <= LONGEST_LIFE:
            raise InvalidRequestError(
                f"expires_after must lie between {SHORTEST_LIFE} and {LONGEST_LIFE} seconds.", param="expires_after"
            )
        file_id = new_id("file")
        incoming = self._storage.objects.begin()
        try:
            await self._receive(incoming, chunks)
            status, details = await self._check(principal.tenant_id, incoming, purpose)
            now = unix_now()
            row = FileRow(
                id=file_id,
                tenant_id=principal.tenant_id,
                bytes=incoming.size,
                created_at=now,
                filename=label,
                purpose=purpose,
                status=status,
                status_details=details,
                expires_at=None if expires_after is None else now + expires_after,
                sha256=incoming.sha256,
            )
        except BaseException:
            await asyncio.to_thread(incoming.discard)
            raise
        await to_its_end(self._keep(incoming, row, receipt))
        self._failpoints.hit("files.after_create")
        return file_record(row)

    async def list(
        self,
        principal: Principal,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> Page[FileRecord]:
        """One page of the tenant's files, newest first by default."""
        query = files_of(principal.tenant_id, purpose)
        async with self._database.read() as session:
            return await page(session, query, FileRow, file_record, after=after, limit=limit, order=order)

    async def get(self, principal: Principal, file_id: str) -> FileRecord:
        """One file, or NotFoundError."""
        async with self._database.read() as session:
            return file_record(await find_file(session, principal.tenant_id, file_id))

    async def content(self, principal: Principal, file_id: str) -> str:
        """Path of a file's bytes, to be read and not changed."""
        await self.get(principal, file_id)
        return await asyncio.to_thread(self._storage.objects.local, principal.tenant_id, file_id)

    async def delete(self, principal: Principal, file_id: str) -> None:
        """Remove a file. ConflictError while a job that has not ended uses it."""
        async with self._database.write(frees=True) as session:
            row = await find_file(session, principal.tenant_id, file_id)
            user = await unfinished_user(session, principal.tenant_id, file_id)
            if user is not None:
                raise ConflictError(
                    f"The file {file_id} is used by the job {user}; cancel it or wait until it ends.",
                    code="file_in_use",
                )
            await session.delete(row)
        self._failpoints.hit("files.after_delete")
        await self._remove(principal.tenant_id, file_id)
        await self._database.restock()

    async def delete_expired(self) -> int:
        """Remove the expired files of all tenants, except those of unfinished jobs; how many were removed."""
        async with self._database.write(frees=True) as session:
            rows = await expired_files(session, unix_now())
            gone = [row for row in rows if await unfinished_user(session, row.tenant_id, row.id) is None]
            for row in gone:
                await session.delete(row)
        for row in gone:
            await self._remove(row.tenant_id, row.id)
        await self._database.restock()
        return len(gone)

    async def forget(self, session: Session, tenant_id: str) -> AfterCommit:  # noqa: ARG002 - `Holder.forget`
        """What is to go with a tenant: its directory, in which its jobs work too."""

        async def let_go() -> None:
            await asyncio.to_thread(self._storage.forget, tenant_id)

        return let_go

    async def sweep(self, older_than: float) -> int:
        """At start: remove blobs that no row names and that are older than `older_than` (Unix time); how many."""
        async with self._database.read() as session:
            known = await all_files(session)

        def remove_orphans() -> int:
            orphans = [
                entry
                for entry in self._storage.objects.list()
                if (entry.tenant_id, entry.object_id) not in known and entry.written_at < older_than
            ]
            for entry in orphans:
                self._storage.objects.delete(entry.tenant_id, entry.object_id)
            return len(orphans)

        return await asyncio.to_thread(remove_orphans)

    async def _receive(self, incoming: Incoming, chunks: AsyncIterator[bytes]) -> None:
        """Write the chunks, in pieces of about a mebibyte per hop to a thread."""
        # A thread that writes is waited for, also by who is cancelled: the file is closed and removed after that.
        pending: list[bytes] = []
        held = total = 0
        async for chunk in chunks:
            total += len(chunk)
            if total > self._settings.max_file_bytes:
                raise PayloadTooLargeError(
                    f"Files may have at most {self._settings.max_file_bytes} bytes; see TENORA_MAX_FILE_BYTES."
                )
            pending.append(chunk)
            held += len(chunk)
            if held >= _WRITE_BYTES:
                await to_its_end(asyncio.to_thread(incoming.write, b"".join(pending)))
                pending, held = [], 0
        await to_its_end(asyncio.to_thread(incoming.write, b"".join(pending)))
        if total == 0:
            raise InvalidRequestError("The file is empty; send its content as the form field `file`.", param="file")

    async def _keep(self, incoming: Incoming, row: FileRow, receipt: Receipt[FileRecord] | None) -> None:
        """Put the file into its place and list it; neither if that fails."""
        try:
            self._failpoints.hit("files.before_rename")
            await asyncio.to_thread(incoming.keep, row.tenant_id, row.id)
            self._failpoints.hit("files.after_rename")
            async with self._database.write() as session:
                session.add(row)
                if receipt is not None:
                    await receipt.write(session, file_record(row))
        except BaseException:
            await self._remove(row.tenant_id, row.id)
            raise
        finally:
            await asyncio.to_thread(incoming.discard)

    async def _check(self, tenant_id: str, incoming: Incoming, purpose: str) -> tuple[Status, str | None]:
        if purpose != TRAINING_PURPOSE:
            return "uploaded", None

        def validate(tokenizer: Tokenizer) -> ValidationReport:
            return validate_file(Path(incoming.local), tokenizer, max_rows=self._settings.max_training_rows)

        report = await self._tokenizing.upload(tenant_id, validate)
        return ("processed", None) if report.ok else ("error", report.summary())

    async def _remove(self, tenant_id: str, file_id: str) -> None:
        await asyncio.to_thread(self._storage.objects.delete, tenant_id, file_id)


def check_filename(filename: str) -> str:
    """The last part of a client's file name, fit to be shown; InvalidRequestError if nothing is left of it."""
    label = filename.replace("\\", "/").rpartition("/")[2].strip()
    if not label or len(label) > 255 or not label.isprintable():
        raise InvalidRequestError("The file needs a printable name of at most 255 characters.", param="file")
    return label


def file_record(row: FileRow) -> FileRecord:
    """The row as it is handed out."""
    return FileRecord(
        id=row.id,
        tenant_id=row.tenant_id,
        bytes=row.bytes,
        created_at=row.created_at,
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,  # type: ignore[arg-type]  # a column of strings; only these three are written
        status_details=row.status_details,
        expires_at=row.expires_at,
        sha256=row.sha256,
    )
