"""Files and models, as OpenAI's SDK types define them."""

from __future__ import annotations

from typing import Literal, Self

from tenora.api.schemas.base import ResponseModel
from tenora.control.records import FileRecord, ModelCard

EXPIRES_MIN_SECONDS = 3600
EXPIRES_MAX_SECONDS = 30 * 24 * 3600


class FileObject(ResponseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: int | None

    @classmethod
    def of(cls, record: FileRecord) -> Self:
        """The object of a record."""
        return cls(
            id=record.id,
            bytes=record.bytes,
            created_at=record.created_at,
            filename=record.filename,
            purpose=record.purpose,
            status=record.status,
            status_details=record.status_details,
            expires_at=record.expires_at,
        )


class ModelObject(ResponseModel):
    """A model that may be called; adapters have the base as `parent`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        """The object of a card."""
        return cls(
            id=card.id,
            created=card.created,
            owned_by=card.owned_by,
            root=card.root,
            parent=card.parent,
            max_model_len=card.max_model_len,
        )
