"""A group of commands, as `--help` lists it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

_ANY_LENGTH = 1000


class Group(TyperGroup):
    """Lists each command with its whole first sentence, over several lines where it must; click cuts it to one."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands that are to be shown."""
        rows = [
            (name, command.get_short_help_str(_ANY_LENGTH))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
