"""What child processes get of this one's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping


def for_child(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without Tenora's own variables, and `extra` on top.

    Two of them are secrets, the API key and the registry's URL, and everyone of this user can read a process's
    environment. A child is told what it needs by its command line or its standard input.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TENORA_")}
    return {**inherited, **(extra or {})}
