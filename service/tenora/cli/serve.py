"""`tenora serve`."""

from __future__ import annotations

import inspect
from typing import Any

from tenora.cli.options import load_settings, settings_parameters


def serve(**flags: Any) -> None:
    """Serve the base model and every tenant's adapters over HTTP, and train new ones.

    The first start fetches the model and makes an admin key, which it prints once.
    """
    from tenora.cli.serving import run  # noqa: PLC0415 - the web stack, which no other command needs

    run(load_settings(**flags))


# typer reads the signature: one option for each setting.
serve.__signature__ = inspect.Signature(settings_parameters())  # type: ignore[attr-defined]  # functions may have one
