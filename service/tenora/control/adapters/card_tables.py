"""How figures stand in a card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def code(value: str) -> str:
    """A value as code; nothing if it is empty."""
    return f"`{value}`" if value else ""


def number(value: float | None) -> str:
    """With four places."""
    return "unknown" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """With its sign and four places."""
    return "unknown" if value is None else f"{value:+.4f}"


def share(value: float | None) -> str:
    """As a percentage."""
    return "unknown" if value is None else f"{value:.1%}"


def time(seconds: int) -> str:
    """Unix time in words."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
