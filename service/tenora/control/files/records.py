"""What is told of a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class FileRecord:
    """An uploaded file.

    `status`: uploaded (not a training file), processed (usable) or error (`status_details` says why).
    """

    id: str
    tenant_id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: int | None
    sha256: str
