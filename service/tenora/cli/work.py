"""`tenora work`."""

from __future__ import annotations

import inspect
from typing import Any

from tenora.cli.options import load_settings, settings_parameters


def work(**flags: Any) -> None:
    """Work on the fine-tuning jobs of the service that runs on this state directory.

    `tenora serve` starts a worker by itself; this is for one that is to run elsewhere on the machine, under other
    limits, beside a service that has none.
    """
    from tenora.cli.working import run  # noqa: PLC0415 - the registry, which no other command needs

    run(load_settings(**flags))


# typer reads the signature: one option for each setting.
work.__signature__ = inspect.Signature(settings_parameters())  # type: ignore[attr-defined]  # functions may have one
