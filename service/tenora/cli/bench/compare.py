"""What `tenora bench compare` does: the ratios of two reports of the same kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenora.errors import InvalidRequestError

IGNORED = {"parameters", "machine", "seconds", "created", "version", "kind"}
IDENTITY = ("shape", "group", "rows", "ranks", "distribution", "base_share", "name")
"""Fields that tell the entries of a list apart."""


def read(path: Path) -> dict[str, Any]:
    """A report.

    Raises:
        InvalidRequestError: if the file is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read as a report ({error}).") from error
    if not isinstance(value, dict) or "kind" not in value:
        raise InvalidRequestError(f"{path} is not a report of tenora bench: it has no kind.")
    return value


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, float, float, float | None]]:
    """Every figure that both have: name, a, b, b / a; the ratio is None where a is 0.

    Raises:
        InvalidRequestError: if the reports are of different kinds or have no figure in common.
    """
    if a["kind"] != b["kind"]:
        raise InvalidRequestError(f"A report on {a['kind']} and one on {b['kind']} cannot be compared.")
    left, right = dict(_figures(a)), dict(_figures(b))
    rows = [
        (name, left[name], right[name], right[name] / left[name] if left[name] else None)
        for name in left
        if name in right
    ]
    if not rows:
        raise InvalidRequestError("The two reports have no figure in common.")
    return rows


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in IGNORED and key not in IDENTITY:
                yield from _figures(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _figures(item, f"{name}[{_identity(item, index)}]")


def _identity(item: Any, index: int) -> str:
    if not isinstance(item, dict):
        return str(index)
    return " ".join(_word(item[key]) for key in IDENTITY if key in item) or str(index)


def _word(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)
