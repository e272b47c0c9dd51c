"""Flags that are made from the declared settings, so that none is typed here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, Literal

import typer

from tenora.training.settings import Setting


def flag_of(setting: Setting) -> inspect.Parameter:
    """The flag of a setting as it is declared; the server knows the upper bounds.

    What is true or false, or a number that may be given as true, is a switch, which stands for true.
    """
    kind: Any = Literal[setting.choices] if setting.choices else setting.kind
    bounds: dict[str, Any] = {}
    is_switch = kind is bool or bool(setting.true)
    if is_switch:
        kind = bool
    elif setting.every and kind is int:
        kind, bounds = str, {"parser": _number_or_word, "metavar": f"N|{setting.every}"}
    elif kind in {int, float}:
        bounds["min"] = kind(max(setting.least, setting.above))
    option = typer.Option(setting.flag or f"--{setting.name.replace('_', '-')}", help=setting.help, **bounds)
    annotated: Any = Annotated  # mypy would have a type in it
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_switch else None,
        annotation=annotated[kind if is_switch else kind | None, option],
    )


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def with_flags(settings: Mapping[str, Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes of a command one that takes these settings as further keywords."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(**given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        known = [one.replace(kind=one.KEYWORD_ONLY) for one in own if one.kind is not one.VAR_KEYWORD]
        parameters = [*known, *(flag_of(setting) for setting in settings.values())]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # where typer looks
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def given(**values: Any) -> dict[str, Any]:
    """Those that were given: a switch that is not there says nothing."""
    return {name: value for name, value in values.items() if value is not None and value is not False}
