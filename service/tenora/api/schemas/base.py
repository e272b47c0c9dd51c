"""What the schemas share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

T = TypeVar("T")
Number = Annotated[int | float, WithJsonSchema({"type": "number"})]
"""A number as it was stored: 8 is not answered as 8.0."""


class RequestModel(BaseModel):
    """A body or a part of one: unknown fields are refused, a null field is an absent one, and NaN is not a number."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict) or None not in given.values():
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class NamedModel(RequestModel):
    """A request that names what answers it."""

    model: str | None = Field(
        default=None,
        max_length=256,
        description="The base, or an adapter by any of its names; needed unless there is an adapter_id.",
    )
    adapter_id: str | None = Field(
        default=None, max_length=256, description="An adapter, when `model` is the base or absent."
    )


class ResponseModel(BaseModel):
    """An answer or a part of one."""

    model_config = ConfigDict(protected_namespaces=())

    @classmethod
    def of(cls, record: Any) -> Self:
        """The answer about a record of the control plane, whose attributes have the fields' names."""
        return cls.model_validate(record, from_attributes=True)


class StoredModel(ResponseModel):
    """A part of an answer that is shown as it was stored: in that order, without what is absent there.

    What other releases stored is shown whole, with fields that are not known here.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    _stored: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        found = handler(given)
        if isinstance(given, Mapping):
            found._stored = tuple(given)  # noqa: SLF001  # of the class's own
        return found

    @model_serializer(mode="wrap")
    def _as_stored(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # the document would show it
        shown = handler(self)
        return {name: shown[name] for name in self._stored}


class ListResponse(ResponseModel, Generic[T]):
    """A page of a listing; the next one starts `after` its last id."""

    object: Literal["list"] = "list"
    data: Sequence[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def page(cls, data: Sequence[T], *, has_more: bool = False) -> ListResponse[T]:
        """The page with these items, each of which has an `id`."""
        ids = [str(getattr(item, "id", "")) for item in data]
        return cls(data=data, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


class Deleted(ResponseModel):
    """The answer of a DELETE."""

    id: str
    object: str
    deleted: bool = True


def invalid(message: str) -> PydanticCustomError:
    """A finding of a validator. `message` may not quote what was sent: braces would be filled in from nothing."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def no_flag(value: Any) -> Any:
    """A validator for a number: true, which pydantic would take for 1, is none."""
    if isinstance(value, bool):
        raise invalid("must be a number, and not true or false")
    return value


def auto_or_number(kind: type[int] | type[float], low: float, high: float) -> Callable[[Any], Any]:
    """A validator for `"auto"` or a number of `kind` between `low` and `high`."""
    word = "a whole number" if kind is int else "a number"

    def check(value: Any) -> Any:
        fits = type(value) is int or (kind is float and type(value) is float)
        if value is None or value == "auto" or (fits and low <= value <= high):
            return value
        raise invalid(f'must be "auto" or {word} from {low:g} to {high:g}')

    return check
