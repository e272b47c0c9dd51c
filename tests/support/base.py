"""The real base model for tests marked `real`."""

from __future__ import annotations

import os
from pathlib import Path

from tenora.model.catalog import resolve_model


def real_base() -> Path:
    """Directory of smollm2-135m, fetched into $TENORA_HOME (default ~/.tenora) the first time.

    Safe in parallel test processes: `catalog.pull` holds a file lock and renames the finished directory into place.
    """
    home = Path(os.environ.get("TENORA_HOME", "~/.tenora")).expanduser()
    return resolve_model("smollm2-135m", home).directory
