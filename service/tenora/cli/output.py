"""Printing: aligned columns for people, JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from pydantic import BaseModel

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under their columns, as wide as they are: an id that is cut off cannot be copied."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    for line in [[name.upper() for name in columns], *cells]:
        typer.echo("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


def show_objects(objects: Iterable[BaseModel], columns: Sequence[str], *, as_json: bool) -> None:
    """Print objects of the API: the fields that `columns` name, or everything as JSON."""
    if as_json:
        for item in objects:
            typer.echo(item.model_dump_json())
        return
    show_table(columns, ([_field(item, name) for name in columns] for item in objects))


def show_object(item: BaseModel, *, as_json: bool) -> None:
    """Print every field of one object that has a value."""
    if as_json:
        typer.echo(item.model_dump_json())
        return
    fields = {name: value for name, value in item.model_dump(mode="json").items() if value not in (None, {}, [])}
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        shown = moment(value) if name.endswith(("_at", "_finish")) else _cell(value)
        typer.echo(f"{name.ljust(width)}  {shown}")


def moment(seconds: int | None) -> str:
    """Local time of a Unix time."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _field(item: BaseModel, name: str) -> Any:
    value = getattr(item, name, None)
    return moment(value) if name.endswith("_at") else value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
