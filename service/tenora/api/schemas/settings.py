"""Models of requests and answers made from the declared settings, so that no setting is typed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, StrictBool, create_model

from tenora.api.schemas.base import RequestModel, ResponseModel, auto_or_number, invalid
from tenora.training.methods.table import METHODS
from tenora.training.settings import Setting


def model_of(name: str, settings: Mapping[str, Setting], *, doc: str | None = None) -> type[RequestModel]:
    """A part of a request with these fields, each of which may be absent."""
    fields: dict[str, Any] = {name: (_type(setting), _field(setting)) for name, setting in settings.items()}
    return create_model(name, __base__=RequestModel, __doc__=doc, **fields)


def echo_of(name: str, settings: Mapping[str, Setting]) -> type[ResponseModel]:
    """A part of an answer with these fields, each a value or null."""
    fields: dict[str, Any] = {name: (_value_type(setting) | None, ...) for name, setting in settings.items()}
    return create_model(name, __base__=ResponseModel, **fields)


def method_model(name: str, *, doc: str) -> type[RequestModel]:
    """`{"type": <method>, <method>: {"hyperparameters": {…}}}` for the methods that there are."""
    fields: dict[str, Any] = {"type": (Literal[tuple(METHODS)], ...)}
    for kind, method in METHODS.items():
        title = kind.replace("_", " ").title().replace(" ", "")
        own = model_of(f"{title}Hyperparameters", method.hyperparameters, doc=f"Those of the method {kind}.")
        inner: dict[str, Any] = {"hyperparameters": (own | None, None)}
        options = create_model(
            title,
            __base__=RequestModel,
            __doc__=f"Options of a method that {method.summary}.",
            **inner,
        )
        fields[kind] = (options | None, None)
    return create_model(name, __base__=RequestModel, __doc__=doc, **fields)


def _value_type(setting: Setting) -> Any:
    return Literal[setting.choices] if setting.choices else setting.kind


def _type(setting: Setting) -> Any:
    kind = _value_type(setting)
    if setting.auto:
        sent = kind | Literal["auto"] | None
        return Annotated[
            sent, PlainValidator(auto_or_number(kind, setting.least, setting.most), json_schema_input_type=sent)
        ]
    if setting.true:
        sent = bool | kind | None
        return Annotated[sent, PlainValidator(_flag_or_number(setting), json_schema_input_type=sent)]
    return (StrictBool if kind is bool else kind) | None


def _field(setting: Setting) -> Any:
    bounds: dict[str, Any] = {}
    if not (setting.auto or setting.true or setting.choices or setting.kind is bool):
        bounds = {"ge": setting.least, "gt": setting.above, "le": setting.most}
        bounds = {name: setting.kind(bound) for name, bound in bounds.items() if math.isfinite(bound)}
    text = f"{setting.help} auto: {setting.auto}." if setting.auto else setting.help
    return Field(default=None, description=text, **bounds)


def _flag_or_number(setting: Setting) -> Any:
    def check(value: Any) -> Any:
        if value is None or isinstance(value, bool) or (isinstance(value, int) and setting.holds(value)):
            return value
        raise invalid(f"must be {setting.words}")

    return check
