"""`tenora pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from tenora.cli.options import load_settings
from tenora.cli.progress import StartProgress
from tenora.model.catalog import resolve_model
from tenora.model.fetch import interruptible
from tenora.telemetry import logs


def pull(
    model: Annotated[
        str | None, typer.Argument(help="A name of the catalogue or a hub id. [env: TENORA_MODEL]")
    ] = None,
) -> None:
    """Fetch a base model into $TENORA_HOME/models, unless it is there already."""
    settings = load_settings(model=model)
    logs.configure(settings.log_level)
    with interruptible(), StartProgress(phase="download") as progress:
        found = resolve_model(settings.model, settings.root, progress)
    typer.echo(f"{found.id} is in {found.directory}")
