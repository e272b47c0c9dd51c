"""`tenora files`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tenora.cli.connection import connect
from tenora.cli.groups import Group
from tenora.cli.output import AsJson, show_object, show_objects
from tenora.cli.setting_flags import given, with_flags
from tenora.training.settings import ROWS

app = typer.Typer(cls=Group, no_args_is_help=True, help="Training files: upload, preview, list, download, delete.")
Existing = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A JSONL, CSV or Parquet file.")
]


@app.command()
def upload(
    path: Existing,
    purpose: Annotated[str, typer.Option(help="What the file is for.")] = "fine-tune",
    as_json: AsJson = False,
) -> None:
    """Upload a file; training files are checked line by line."""
    with connect() as client:
        uploaded = client.files.upload(path, purpose=purpose, progress=True)
    show_object(uploaded, as_json=as_json)
    if uploaded.status == "error":
        raise typer.Exit(1)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """All files, newest first."""
    with connect() as client:
        columns = ("id", "created_at", "bytes", "purpose", "status", "filename")
        show_objects(client.files.list(), columns, as_json=as_json)


@app.command()
@with_flags(ROWS)
def preview(
    file_id: str,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100, help="How many rows.")] = 5,
    after: Annotated[int, typer.Option("--after", min=0, help="Begin after this line.")] = 0,
    as_json: AsJson = False,
    **rows: Any,
) -> None:
    """Show rows as the model would see them: what is learned, what is cut, what is wrong."""
    with connect() as client:
        found = client.files.preview(file_id, limit=limit, after=after, **given(**rows))
    if as_json:
        typer.echo(found.model_dump_json())
        return
    for row in found.data:
        cut = f", {row.truncated_tokens} more are cut off" if row.truncated else ""
        part = "" if row.part is None else f" ({row.part})"
        learned = f"{row.trained_tokens} learned" if row.label is None else f"label {row.label!r}"
        typer.secho(f"line {row.line}{part}: {row.tokens} tokens, {learned}{cut}", bold=True)
        for span in row.spans:
            typer.secho(span.text, nl=False, fg=typer.colors.GREEN if span.trained else None)
        if row.spans:
            typer.echo()
        for issue in row.issues:
            typer.secho(f"{issue.code}: {issue.message}", fg=typer.colors.RED)
    totals = found.totals
    typer.echo(
        f"form {found.format or '-'}; {totals.rows} rows shown, {totals.unusable} of them unusable, "
        f"{totals.truncated} cut; {totals.tokens} tokens, {totals.trained_tokens} learned"
    )
    if found.has_more:
        typer.echo(f"more: tenora files preview {file_id} --after {found.last_line}", err=True)


@app.command()
def download(file_id: str, path: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write a file's bytes to PATH: a training file, or what a job has left."""
    with connect() as client:
        client.files.download(file_id, path, progress=True)
    typer.echo(str(path))


@app.command()
def delete(file_id: str) -> None:
    """Delete a file."""
    with connect() as client:
        client.files.delete(file_id)
    typer.echo(f"{file_id} is deleted.")
