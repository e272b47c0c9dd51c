"""The base of the objects of the API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class ApiObject(BaseModel):
    """Base of all: immutable, and tolerant of what a newer server adds."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class Part(ApiObject):
    """A part of an object; what the server left out of it is None, and is left out when it is dumped."""

    @model_serializer(mode="wrap")
    def _as_sent(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}
