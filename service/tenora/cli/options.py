"""Settings as options: every field of `Settings` is a flag, so flag and `TENORA_` variable cannot drift apart."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import SettingsError

from tenora.config import Settings
from tenora.errors import SettingError

SECRET = {"api_key", "database_url"}  # a flag would show them to everyone who lists processes


def settings_parameters() -> list[inspect.Parameter]:
    """One keyword parameter for each setting that may be a flag, for typer to read."""
    return [_parameter(name, field) for name, field in Settings.model_fields.items() if name not in SECRET]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    several = field.annotation == tuple[Path, ...]
    annotation: Any = list[Path] if several else field.annotation
    default = "" if field.default in (None, ()) else f", default: {field.default}"
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description} [env: {variable(name)}{default}]",
        case_sensitive=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
    )


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"TENORA_{name.upper()}"


def load_settings(**flags: Any) -> Settings:
    """Settings from the environment, with the flags that were given on top.

    Raises:
        SettingError: a value that is out of range or cannot be read; it names the variable.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        raise SettingError(f"{variable(name)} (or --{name.replace('_', '-')}): {problem['msg']}.") from error
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        name = variable(field[1]) if field else "A setting"
        raise SettingError(f"{name} cannot be read; write a list as JSON, as in '[\"/srv/adapters\"]'.") from error
