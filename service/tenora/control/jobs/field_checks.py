"""Checks of single fields of a request. Each raises InvalidRequestError with the field's name as `param`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

from tenora.errors import InvalidRequestError


def known_fields(given: Any, allowed: Collection[str], where: str) -> Mapping[str, Any]:
    """Return `given` if it is an object with no other fields than these."""
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    for name in given:
        if name not in allowed:
            raise InvalidRequestError(
                f"{where}.{name} is not known; {where} takes {', '.join(allowed)}.",
                code="unknown_parameter",
                param=f"{where}.{name}",
            )
    return given


def is_int(value: Any, least: int, most: int) -> TypeGuard[int]:
    """Whether it is a whole number within the bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole(value: Any, param: str, least: int, most: int) -> int:
    """Return a whole number within the bounds."""
    if not is_int(value, least, most):
        raise InvalidRequestError(f"{param} must be a whole number from {least} to {most}.", param=param)
    return value


def real(value: Any, param: str, *, most: float, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return a number within the bounds as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (above < value and least <= value <= most):
        low = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise InvalidRequestError(f"{param} must be a number, {low} and at most {most:g}.", param=param)
    return float(value)


def flag(value: Any, param: str) -> bool:
    """Return true or false; None is false."""
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"{param} must be true or false.", param=param)
    return bool(value)


def one_of(value: Any, param: str, allowed: Collection[str]) -> str:
    """Return a word that is one of these."""
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequestError(f"{param} must be one of {', '.join(allowed)}.", param=param)
    return value
