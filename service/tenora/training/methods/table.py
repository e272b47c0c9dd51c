"""The methods that there are. A new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tenora.data.rows import RowKind
from tenora.errors import TrainingError
from tenora.training.methods import dpo, feature_extraction, full, supervised
from tenora.training.methods.method import Method, Unit

_TABLE: dict[str, Method] = {
    method.name: method for method in (supervised.METHOD, dpo.METHOD, feature_extraction.METHOD, full.METHOD)
}
METHODS: Mapping[str, Method] = MappingProxyType(_TABLE)
APART = tuple(name for name, method in METHODS.items() if method.runs_apart)
"""Those that train in a process of their own."""
USUAL = supervised.METHOD
"""Of a job that names none."""


def find_method(name: str) -> Method:
    """The method of a stored plan.

    Raises:
        TrainingError: there is none of that name here.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise TrainingError(f"The method {name!r} is not available here.", code="method_unavailable") from None


def find_unit(name: str) -> Unit:
    """The unit of a stored comparison; one that no method has any more is told like the usual one."""
    return next((method.unit for method in METHODS.values() if method.unit.name == name), USUAL.unit)


def register(method: Method) -> None:
    """Add a method. Schemas are made from the table when they are imported, so it has to be there before.

    Raises:
        ValueError: the name is taken, or one of its settings is called as one of every method's.
    """
    if method.name in _TABLE:
        raise ValueError(f"there is a method {method.name!r} already.")
    if len(method.asked) < len(USUAL.hyperparameters) + len(method.settings):
        raise ValueError(f"a setting of {method.name!r} has the name of one that all methods have.")
    _TABLE[method.name] = method


def wrong_rows(method: Method, wanted: RowKind, found: RowKind) -> str:
    """What is said to whoever sends rows of another kind than the method is asked to learn from."""
    others = [other.name for other in METHODS.values() if other.rows == found and other is not method]
    instead = f', or use method {others[0]} ("method": {{"type": "{others[0]}"}})' if others else ""
    return (
        f"The training file cannot be used: it holds {found.name}, and method {method.name} needs {wanted.name} "
        f"({wanted.fields}). Send such rows{instead}."
    )
