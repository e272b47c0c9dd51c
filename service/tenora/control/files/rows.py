"""Rows of files inside an open transaction."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import ColumnElement, Select, String, cast, or_, select

from tenora.control.registry.database import Session
from tenora.control.registry.tables import TERMINAL, FileRow, JobRow
from tenora.errors import NotFoundError


async def find_file(session: Session, tenant_id: str, file_id: str, *, param: str = "file_id") -> FileRow:
    """The row of a file that has not expired, or NotFoundError, equal for missing and foreign ids."""
    row = await session.scalar(
        select(FileRow).where(FileRow.tenant_id == tenant_id, FileRow.id == file_id, _unexpired())
    )
    if row is None:
        raise NotFoundError(f"There is no file {file_id!r}; GET /v1/files lists yours.", param=param)
    return row


def files_of(tenant_id: str, purpose: str | None) -> Select[FileRow]:
    """The files of a tenant that have not expired, of one purpose or of all."""
    query = select(FileRow).where(FileRow.tenant_id == tenant_id, _unexpired())
    return query if purpose is None else query.where(FileRow.purpose == purpose)


async def expired_files(session: Session, now: int) -> Sequence[FileRow]:
    """The files of all tenants whose time is over."""
    return (await session.scalars(select(FileRow).where(FileRow.expires_at <= now))).all()


async def unfinished_user(session: Session, tenant_id: str, file_id: str) -> str | None:
    """The id of a job that has not ended and reads this file."""
    user: str | None = await session.scalar(
        select(JobRow.id)
        .where(
            JobRow.tenant_id == tenant_id,
            JobRow.status.not_in(sorted(TERMINAL)),
            or_(
                JobRow.training_file == file_id,
                JobRow.validation_file == file_id,
                # Ids have no character that JSON escapes or LIKE interprets.
                cast(JobRow.training_files, String).contains(f'"{file_id}"'),
            ),
        )
        .limit(1)
    )
    return user


async def all_files(session: Session) -> set[tuple[str, str]]:
    """Tenant and id of every file; for the start."""
    return {(row.tenant_id, row.id) for row in await session.execute(select(FileRow.tenant_id, FileRow.id))}


async def digests(session: Session, tenant_id: str, file_ids: Collection[str]) -> Mapping[str, str]:
    """SHA-256 of those files of a tenant that there still are, by id."""
    query = select(FileRow.id, FileRow.sha256).where(FileRow.tenant_id == tenant_id, FileRow.id.in_(file_ids))
    return {found.id: found.sha256 for found in await session.execute(query)}


def _unexpired() -> ColumnElement[bool]:
    return or_(FileRow.expires_at.is_(None), FileRow.expires_at > int(time.time()))
