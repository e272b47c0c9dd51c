"""The base of the objects of the API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ApiObject(BaseModel):
    """Base of all: immutable, and tolerant of what a newer server adds."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())
