from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.base import real_base
from tests.support.tiny import build_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **overrides)`: a random model's directory, built once per session and left unchanged."""
    built: dict[str, Path] = {}

    def build(family: str = "smollm2", **overrides: Any) -> Path:
        key = repr((family, sorted(overrides.items(), key=repr)))
        if key not in built:
            built[key] = build_tiny(tmp_path_factory.mktemp(family), family, **overrides)
        return built[key]

    return build


@pytest.fixture(scope="session")
def base() -> Path:
    """The real base's directory."""
    return real_base()
