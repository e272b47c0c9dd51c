"""Reading multipart forms: parts go to disk as they arrive, so that memory does not grow with an upload."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tenora.errors import InvalidRequestError, PayloadTooLargeError

MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
BINARY = {"type": "string", "format": "binary"}


def form_schema(*, required: Sequence[str], properties: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its form by itself."""
    schema = {"type": "object", "required": list(required), "properties": dict(properties)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass(slots=True)
class UploadedFile:
    """A file part on disk; `filename` is the last component of what the client called it."""

    path: Path
    filename: str
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


@dataclass(slots=True)
class Form:
    """A multipart form: its text fields, and its files by field name. The files go when the form is closed."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, UploadedFile] = field(default_factory=dict)

    def file(self, name: str) -> UploadedFile:
        """The file of that field; InvalidRequestError if it was not sent."""
        if name not in self.files:
            raise missing(name)
        return self.files[name]

    def text(self, name: str) -> str:
        """The text of that field; InvalidRequestError if it was not sent."""
        if name not in self.fields:
            raise missing(name)
        return self.fields[name]

    def fingerprint(self) -> bytes:
        """The same for forms with the same content, whatever the boundary and the order of the parts."""
        lines = [f"{name}={value}" for name, value in self.fields.items()]
        lines += [f"{name}:{upload.filename}:{upload.digest.hexdigest()}" for name, upload in self.files.items()]
        return "\n".join(sorted(lines)).encode()


def missing(name: str) -> InvalidRequestError:
    """The error for a field that was not sent."""
    return InvalidRequestError(f"The field {name!r} is missing.", code="missing_required_parameter", param=name)


@asynccontextmanager
async def read_form(
    request: Request, directory: Path, *, fields: Collection[str], files: Mapping[str, int]
) -> AsyncIterator[Form]:
    """Read the request's form; its files lie in `directory` until the block ends.

    Args:
        fields: names of the text fields that are allowed.
        files: names of the file fields that are allowed, each with its largest size in bytes.

    Raises:
        InvalidRequestError: not a well-formed multipart form, or a field that is unknown, sent twice or too long.
        PayloadTooLargeError: a file is over its limit.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequestError("Send the request as multipart/form-data.", code="invalid_form")
    form = Form()
    reader = _Reader(boundary, directory, fields, files, form)
    try:
        async for chunk in request.stream():
            await asyncio.to_thread(reader.feed, chunk)  # the disk may be slow
        reader.end()
        yield form
    finally:
        if reader.open_file is not None:
            reader.open_file.close()
        for upload in form.files.values():
            upload.path.unlink(missing_ok=True)


class _Reader:
    """Feeds the parser and puts what it finds into the form."""

    def __init__(
        self, boundary: bytes, directory: Path, fields: Collection[str], files: Mapping[str, int], form: Form
    ) -> None:
        self.directory = directory
        self.allowed_fields = fields
        self.allowed_files = files
        self.form = form
        self.open_file: BinaryIO | None = None
        self.parts = 0
        self.complete = False
        self.name = ""
        self.header = bytearray(), bytearray()
        self.headers: dict[bytes, bytes] = {}
        self.value = bytearray()
        try:
            self.parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise malformed() from None

    def feed(self, chunk: bytes) -> None:
        """Parse a piece of the body."""
        try:
            self.parser.write(chunk)
        except FormParserError:
            raise malformed() from None

    def end(self) -> None:
        """The body is over; InvalidRequestError if the form is not."""
        if not self.complete:
            raise malformed()

    def _part_begin(self) -> None:
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise InvalidRequestError(f"A form may have at most {MAX_PARTS} parts.", code="invalid_form")
        self.headers, self.value = {}, bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.header[1].extend(data[start:end])

    def _header_end(self) -> None:
        self.headers[bytes(self.header[0]).lower()] = bytes(self.header[1])
        self.header = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self.headers.get(b"content-disposition", b"").decode("latin-1"))
        try:
            self.name = options.get(b"name", b"").decode()
            filename = options[b"filename"].decode() if b"filename" in options else None
        except UnicodeDecodeError:
            raise malformed() from None
        allowed = self.allowed_files if filename is not None else self.allowed_fields
        if self.name not in allowed:
            raise self._refused(filename)
        if self.name in self.form.fields or self.name in self.form.files:
            raise InvalidRequestError(f"The field {self.name!r} was sent twice.", code="invalid_form", param=self.name)
        if filename is not None:
            upload = UploadedFile(self.directory / f"upload-{secrets.token_hex(12)}", safe_filename(filename))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self.open_file = os.fdopen(os.open(upload.path, flags, 0o600), "wb")
            self.form.files[self.name] = upload

    def _refused(self, filename: str | None) -> InvalidRequestError:
        if self.name in self.allowed_files:
            return InvalidRequestError(f"{self.name} must be a file part, with a filename.", param=self.name)
        if filename is not None and self.name in self.allowed_fields:
            return InvalidRequestError(f"{self.name} must be a text field, without a filename.", param=self.name)
        known = ", ".join([*self.allowed_fields, *self.allowed_files])
        return InvalidRequestError(
            f"Unknown form field {self.name!r}. This form takes {known}.",
            code="unknown_parameter",
            param=self.name or None,
        )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self.open_file is None:
            self.value += data[start:end]
            if len(self.value) > MAX_FIELD_BYTES:
                raise InvalidRequestError(f"{self.name} is longer than {MAX_FIELD_BYTES} bytes.", param=self.name)
            return
        upload = self.form.files[self.name]
        upload.size += end - start
        limit = self.allowed_files[self.name]
        if upload.size > limit:
            raise PayloadTooLargeError(
                f"{self.name} is larger than the limit of {limit} bytes. Send a smaller file.", param=self.name
            )
        piece = data[start:end]
        upload.digest.update(piece)
        self.open_file.write(piece)

    def _part_end(self) -> None:
        if self.open_file is not None:
            self.open_file.close()
            self.open_file = None
            return
        try:
            self.form.fields[self.name] = self.value.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"{self.name} is not UTF-8 text.", param=self.name) from None

    def _end(self) -> None:
        self.complete = True


def malformed() -> InvalidRequestError:
    """The error for a body that is not a form."""
    return InvalidRequestError("The body is not a complete multipart form. Send it again.", code="invalid_form")


def safe_filename(name: str) -> str:
    """The last component of a path, without control characters, at most 255 long: a label, never a place on disk."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(char for char in last if char.isprintable())[:255] or "upload"
