"""`tenora files`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenora.cli.connection import connect
from tenora.cli.output import AsJson, show_object, show_objects

app = typer.Typer(no_args_is_help=True, help="Training files: upload, list, delete.")
Existing = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A JSONL file.")]


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
def delete(file_id: str) -> None:
    """Delete a file."""
    with connect() as client:
        client.files.delete(file_id)
    typer.echo(f"{file_id} is deleted.")
