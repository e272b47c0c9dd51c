"""`tenora adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenora.cli.connection import connect
from tenora.cli.groups import Group
from tenora.cli.output import AsJson, show_object, show_objects

app = typer.Typer(cls=Group, no_args_is_help=True, help="Adapters: list, import, download, delete, rollback.")
PeftDirectory = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Saved by PEFT, or by AdapterHub's library.")
]
Target = Annotated[Path | None, typer.Option("--output", "-o", help="Default: <name>.zip here.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """All adapters."""
    with connect() as client:
        columns = ("name", "version", "rank", "bytes", "source", "resident", "created_at", "digest")
        show_objects(client.adapters.list(), columns, as_json=as_json)


@app.command("import")
def import_(name: str, directory: PeftDirectory, as_json: AsJson = False) -> None:
    """Import a PEFT directory; a name in use gets a new version."""
    with connect() as client:
        show_object(client.adapters.import_(name, directory, progress=True), as_json=as_json)


@app.command()
def download(name: str, output: Target = None) -> None:
    """Fetch an adapter as a zip that holds its PEFT directory."""
    target = output or Path(f"{name.rpartition('/')[2]}.zip")
    with connect() as client:
        client.adapters.download(name, target, progress=True)
    typer.echo(f"{name} is in {target}")


@app.command()
def delete(name: str) -> None:
    """Delete an adapter and all its versions."""
    with connect() as client:
        client.adapters.delete(name)
    typer.echo(f"{name} is deleted.")


@app.command()
def rollback(name: str, version: str) -> None:
    """Point an adapter's name at another of its versions: a number, or the beginning of a digest."""
    with connect() as client:
        adapter = client.adapters.rollback(name, int(version) if version.isdecimal() and len(version) < 8 else version)
    typer.echo(f"{adapter.name} is at version {adapter.version}.")
