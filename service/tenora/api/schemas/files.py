"""Files and models, as OpenAI's SDK types define them."""

from __future__ import annotations

from typing import Literal

from tenora.api.schemas.base import ResponseModel


class FileObject(ResponseModel):
    """An uploaded file: a `FileRecord` of the control plane."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: int | None


class ModelObject(ResponseModel):
    """A `ModelCard` of the control plane: a model that may be called; adapters have the base as `parent`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
