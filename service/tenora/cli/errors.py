"""Errors become one line on stderr and exit status 1, or 2 for what the command was given; a traceback is for bugs."""

from __future__ import annotations

from typing import Any

import typer

from tenora.cli.groups import Group
from tenora.errors import SettingError, TenoraError
from tenora_client import TenoraError as ClientError


class Commands(Group):
    """The root of the command tree."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except (TenoraError, ClientError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, SettingError) else 1) from error
