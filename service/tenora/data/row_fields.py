"""Fields of a row, and how they are named to its owner. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tenora.data.rows import RowChecker, kind_of

MAX_DEPTH = 100
"""No row of any use is deeper, and what renders it is recursive."""


def text_field(value: Mapping[str, Any], key: str, checker: RowChecker, *, may_be_empty: bool = False) -> str:
    """The string under a key; what is wrong with it is reported, and then "" is returned."""
    content = value.get(key)
    if not isinstance(content, str):
        checker.report("data_type", f"`{key}` is {kind_of(content)}; make it a string (conversations use `messages`).")
        return ""
    if not content and not may_be_empty:
        checker.report("missing_content", f"`{key}` is empty; give it some text.")
    return content


def without_nulls(value: Any, *, depth: int = MAX_DEPTH) -> Any:
    """The value without the keys whose value is null: they are absent, whichever writer filled them in.

    A message's null `content` stays, to be told from one that was forgotten. Items of lists stay, too.

    Raises:
        RecursionError: lists and objects lie in each other more than `depth` deep.
    """
    if not isinstance(value, dict | list):
        return value
    if not depth:
        raise RecursionError(f"lists and objects lie more than {MAX_DEPTH} deep in each other")
    if isinstance(value, list):
        return [without_nulls(item, depth=depth - 1) for item in value]
    return {
        key: without_nulls(item, depth=depth - 1)
        for key, item in value.items()
        if item is not None or (key == "content" and "role" in value)
    }


def quoted(keys: Iterable[str]) -> str:
    """Keys in a sentence: `a`, `b` and `c`."""
    names = [f"`{key}`" for key in keys]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
