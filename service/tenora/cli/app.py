"""All commands in one tree. Only what a command needs is imported, so that `tenora --help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from tenora import __version__
from tenora.cli import adapters, chat, doctor, files, jobs, keys, pull, serve, tenants, train, work
from tenora.cli.bench import commands as bench
from tenora.cli.errors import Commands

app = typer.Typer(
    cls=Commands,
    name="tenora",
    help="Train and serve many tenants' LoRA adapters on one frozen base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tenora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train and serve many tenants' LoRA adapters on one frozen base model."""


app.command("serve")(serve.serve)
app.command("work")(work.work)
app.command("pull")(pull.pull)
app.command("chat")(chat.chat)
app.command("train")(train.train)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the `tenora` command."""
    app()
