"""/v1/files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from tenora.api.dependencies import ControlDep, JsonRoute, LifecycleDep, SettingsDep, may
from tenora.api.idempotency import once
from tenora.api.multipart import BINARY, Form, form_schema, read_form
from tenora.api.schemas.base import Deleted, ListResponse
from tenora.api.schemas.files import FileObject, PreviewObject, PreviewRequest
from tenora.api.sse import while_connected
from tenora.control.files.files import LONGEST_LIFE, SHORTEST_LIFE
from tenora.control.files.records import FileRecord
from tenora.control.tenancy.idempotency import Receipt
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError

router = APIRouter(tags=["files"], route_class=JsonRoute)
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_CHUNK = 2**20
FORM_SCHEMA = form_schema(
    required=("file", "purpose"),
    properties={
        "file": BINARY,
        "purpose": {"type": "string"},
        _ANCHOR: {"type": "string", "enum": ["created_at"]},
        _SECONDS: {"type": "integer", "minimum": SHORTEST_LIFE, "maximum": LONGEST_LIFE},
    },
)


@router.post("/v1/files", response_model=FileObject, openapi_extra=FORM_SCHEMA)
async def upload_file(
    request: Request,
    caller: Annotated[Principal, may("files.create")],
    control: ControlDep,
    settings: SettingsDep,
    lifecycle: LifecycleDep,
) -> Response:
    """Upload a file; a training file (`purpose: fine-tune`) is checked line by line, and `status` says how it went."""
    fields = ("purpose", _ANCHOR, _SECONDS)
    async with read_form(
        request, settings.root / "staging", fields=fields, files={"file": settings.max_file_bytes}
    ) as form:
        expires_after = _expiry(form)
        purpose, upload = form.text("purpose"), form.file("file")

        async def store(receipt: Receipt[FileRecord] | None) -> FileRecord:
            return await control.files.create(
                caller,
                filename=upload.filename,
                purpose=purpose,
                chunks=_chunks(upload.path),
                expires_after=expires_after,
                receipt=receipt,
            )

        stored = once(request, control, caller, form.fingerprint(), store, FileObject.of)
        return await while_connected(stored, request.receive, lifecycle)


def _expiry(form: Form) -> int | None:
    if _ANCHOR not in form.fields and _SECONDS not in form.fields:
        return None
    if form.text(_ANCHOR) != "created_at":
        raise InvalidRequestError(f'{_ANCHOR} must be "created_at".', param=_ANCHOR)
    seconds = form.text(_SECONDS)
    if not (seconds.isascii() and seconds.isdecimal() and SHORTEST_LIFE <= int(seconds[:10]) <= LONGEST_LIFE):
        raise InvalidRequestError(
            f"{_SECONDS} must be a number of seconds from {SHORTEST_LIFE} to {LONGEST_LIFE}.",
            param=_SECONDS,
        )
    return int(seconds)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, _CHUNK):
            yield chunk
    finally:
        file.close()


@router.get("/v1/files")
async def list_files(
    caller: Annotated[Principal, may("files.list")],
    control: ControlDep,
    after: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> ListResponse[FileObject]:
    """The tenant's files, newest first unless `order` is asc."""
    page = await control.files.list(caller, after=after, limit=limit, order=order, purpose=purpose)
    return ListResponse.page([FileObject.of(record) for record in page.items], has_more=page.has_more)


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, caller: Annotated[Principal, may("files.read")], control: ControlDep) -> FileObject:
    """One file."""
    return FileObject.of(await control.files.get(caller, file_id))


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, caller: Annotated[Principal, may("files.delete")], control: ControlDep) -> Deleted:
    """Delete a file and its content."""
    await control.files.delete(caller, file_id)
    return Deleted(id=file_id, object="file")


@router.post("/v1/files/{file_id}/preview")
async def preview_file(
    file_id: str,
    request: Request,
    caller: Annotated[Principal, may("files.preview")],
    control: ControlDep,
    lifecycle: LifecycleDep,
    body: PreviewRequest = PreviewRequest(),
) -> PreviewObject:
    """Rows of a training file as the model would see them: tokens, what is learned, what is cut, what is wrong."""
    preview = control.previews.preview(
        caller,
        file_id,
        limit=body.limit,
        after=body.after,
        rows=body.row_settings(),
    )
    return PreviewObject.of_file(file_id, await while_connected(preview, request.receive, lifecycle))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def get_file_content(
    file_id: str, caller: Annotated[Principal, may("files.download")], control: ControlDep
) -> FileResponse:
    """The bytes of a file."""
    record = await control.files.get(caller, file_id)
    path = await control.files.content(caller, file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=record.filename)
