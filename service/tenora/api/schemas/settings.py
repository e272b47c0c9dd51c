"""Models of requests and answers made from the declared settings, so that no setting is typed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, StrictBool, create_model

from tenora.api.schemas.base import Number, RequestModel, ResponseModel, StoredModel, auto_or_number, invalid, no_flag
from tenora.training.kinds.table import KINDS, OWN
from tenora.training.methods.table import METHODS
from tenora.training.settings import Setting
from tenora.training.spec import LORA_ASKED, USUAL_KIND


def model_of(name: str, settings: Mapping[str, Setting], *, doc: str | None = None) -> type[RequestModel]:
    """A part of a request with these fields, each of which may be absent."""
    fields: dict[str, Any] = {name: (_type(setting), _field(setting)) for name, setting in settings.items()}
    return create_model(name, __base__=RequestModel, __doc__=doc, **fields)


def echo_of(name: str, settings: Mapping[str, Setting]) -> type[ResponseModel]:
    """A part of an answer with these fields, each a value or, where there is none, null or "auto"."""
    fields: dict[str, Any] = {
        name: (_value_type(setting) | (Literal["auto"] if setting.auto else None), ...)
        for name, setting in settings.items()
    }
    return create_model(name, __base__=ResponseModel, **fields)


def stored_model(
    name: str, settings: Mapping[str, Setting], *, doc: str | None = None, resolved: bool = False
) -> type[StoredModel]:
    """A part of an answer with these fields as they are stored.

    Args:
        resolved: every one of them is there, and none is "auto".
    """
    fields: dict[str, Any] = {}
    for field, setting in settings.items():
        kind = Number if setting.kind is float else _value_type(setting)
        if resolved:
            fields[field] = (kind, Field(description=setting.help))
        else:
            kind = kind | Literal["auto"] if setting.auto else kind
            fields[field] = (kind | None, Field(default=None, description=setting.help))
    return create_model(name, __base__=StoredModel, __doc__=doc, **fields)


def method_model(name: str, *, doc: str) -> type[RequestModel]:
    """`{"type": <method>, <method>: {"hyperparameters": {…}}}` for the methods that there are."""
    return create_model(name, __base__=RequestModel, __doc__=doc, **_methods(RequestModel, model_of, ""))


def stored_method(name: str, *, doc: str) -> type[StoredModel]:
    """The same in an answer."""
    return create_model(name, __base__=StoredModel, __doc__=doc, **_methods(StoredModel, stored_model, "Object"))


def adapter_model(name: str, *, doc: str) -> type[RequestModel]:
    """`{"type": <kind>, …}` with the settings of all kinds of adapters; which of them a kind has is checked with it."""
    kind: dict[str, Any] = {"type": (Literal[tuple(KINDS)], ...)}
    return create_model(name, __base__=model_of(f"{name}Settings", {**LORA_ASKED, **OWN}), __doc__=doc, **kind)


def stored_adapter(name: str, *, doc: str) -> type[StoredModel]:
    """The same in an answer."""
    kind: dict[str, Any] = {"type": (Literal[tuple(KINDS)], USUAL_KIND)}
    return create_model(name, __base__=stored_model(f"{name}Settings", {**LORA_ASKED, **OWN}), __doc__=doc, **kind)


def _methods(base: type[BaseModel], part: Callable[..., type[BaseModel]], ending: str) -> dict[str, Any]:
    """The fields of a method; `part` makes the model of its hyperparameters, `ending` ends the models' names."""
    fields: dict[str, Any] = {"type": (Literal[tuple(METHODS)], ...)}
    for kind, method in METHODS.items():
        title = kind.replace("_", " ").title().replace(" ", "")
        own = part(f"{title}Hyperparameters{ending}", method.hyperparameters, doc=f"Those of the method {kind}.")
        inner: dict[str, Any] = {"hyperparameters": (own | None, None)}
        for group, settings in method.options.items():
            ending_of = f"{title}{group.title()}"
            made = part(f"{ending_of}Options{ending}", settings, doc=f"{group.title()} of the method {kind}.")
            inner |= {group: (made | None, None)} if group else _fields_of(made)
        options = create_model(
            f"{title}{ending}",
            __base__=base,
            __doc__=f"Options of a method that {method.summary}.",
            **inner,
        )
        fields[kind] = (options | None, None)
    return fields


def _fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a model, for another one."""
    return {name: (field.annotation, field) for name, field in model.model_fields.items()}


def _value_type(setting: Setting) -> Any:
    if setting.kind is tuple:
        return list[str] | Literal[setting.every] if setting.every else list[str]
    kind = Literal[setting.choices] if setting.choices else setting.kind
    return kind | Literal[setting.every] if setting.every else kind


def _type(setting: Setting) -> Any:
    kind = _value_type(setting)
    if setting.auto and setting.choices:
        return kind | Literal["auto"] | None
    if setting.auto:
        sent = kind | Literal["auto"] | None
        check = auto_or_number(kind, setting.least, setting.most)
        # A whole number may stand for any, and is handed on as it came.
        return Annotated[int | sent, PlainValidator(check, json_schema_input_type=sent)]
    if setting.true or setting.every or setting.kind is tuple:
        sent = (bool | kind if setting.true else kind) | None
        return Annotated[sent, PlainValidator(_held_by(setting), json_schema_input_type=sent)]
    if kind in {int, float}:
        return Annotated[kind | None, BeforeValidator(no_flag)]
    return (StrictBool if kind is bool else kind) | None


def _field(setting: Setting) -> Any:
    bounds: dict[str, Any] = {}
    if setting.kind is str and not setting.choices:
        bounds = {"min_length": int(setting.least), "max_length": int(setting.most)}
    elif not (setting.auto or setting.true or setting.every or setting.choices or setting.kind in {bool, tuple}):
        bounds = {"ge": setting.least, "gt": setting.above, "le": setting.most}
        bounds = {name: setting.kind(bound) for name, bound in bounds.items() if math.isfinite(bound)}
    text = f"{setting.help} auto: {setting.auto}." if setting.auto else setting.help
    return Field(default=None, description=text, **bounds)


def _held_by(setting: Setting) -> Any:
    def check(value: Any) -> Any:
        is_flag = isinstance(value, bool) and setting.true
        if value is None or is_flag or (not isinstance(value, float) and setting.holds(value)):
            return value
        raise invalid(f"must be {setting.words}")

    return check
