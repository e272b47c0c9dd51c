"""Fields of configurations: the types and bounds that they must have, and what is said of those that are not read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tenora.errors import AdapterFormatError

MAX_ENTRIES = 2048  # of a list, or of a table of patterns
NEUTRAL: tuple[Any, ...] = (None, False, "", "none", [], {})
"""Values of a field that ask for nothing."""
DESCRIPTIVE = frozenset({
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config")
})  # fmt: skip
"""Fields of every PEFT configuration that only describe; their values are kept and not looked at."""


def refuse_unread(raw: Mapping[str, Any], read: Collection[str], unsupported: Mapping[str, str]) -> None:
    """Raise AdapterFormatError for a field that asks for something and is not among those that are read.

    Args:
        raw: the configuration.
        read: fields that are looked at, or that change nothing.
        unsupported: known fields that are not served, each with the reason and what to do.
    """
    for name, value in raw.items():
        if value in NEUTRAL or name in read:
            continue
        if name in unsupported:
            raise AdapterFormatError(f"{name} is {shown(value)}: {unsupported[name]}.")
        raise AdapterFormatError(
            f"{name} is {shown(value)}, a field that this version does not know; export the adapter without it."
        )


def require_causal_lm(raw: Mapping[str, Any]) -> None:
    """Raise AdapterFormatError if the adapter is for another task than giving text."""
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterFormatError(f"task_type is {raw['task_type']!r}; only CAUSAL_LM adapters are served.")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def positive_int(name: str, value: Any) -> int:
    """A rank."""
    if type(value) is not int or not 1 <= value < 2**31:
        raise AdapterFormatError(f"{name} is {shown(value)}; a rank is a whole number from 1 on.")
    return value


def finite(name: str, value: Any) -> float:
    """A number of ordinary size."""
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise AdapterFormatError(f"{name} is {shown(value)}; it must be a number of ordinary size.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or false; null is false."""
    if value is None or type(value) is bool:
        return bool(value)
    raise AdapterFormatError(f"{name} is {shown(value)}; it must be true or false.")


def names(name: str, value: Any, *, required: bool) -> tuple[str, ...] | str:
    """A list of module names, or one regular expression for whole paths."""
    if value in (None, [], "") and not required:
        return ()
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        if len(value) > MAX_ENTRIES:
            raise AdapterFormatError(f"{name} has {len(value)} entries; at most {MAX_ENTRIES} are read.")
        return tuple(value)
    raise AdapterFormatError(f"{name} is {shown(value)}; it must be a list of module names or one regular expression.")


def plain_names(name: str, value: Any) -> tuple[str, ...]:
    """Dotted names without expressions."""
    found = names(name, value, required=False)
    listed = (found,) if isinstance(found, str) else found
    if not all(part.isidentifier() for item in listed for part in item.split(".")):
        raise AdapterFormatError(f"{name} is {shown(value)}; only plain names such as 'layers' are read.")
    return listed


def table(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Module patterns with a value each."""
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise AdapterFormatError(f"{name} must map at most {MAX_ENTRIES} module patterns to numbers.")
    return value
