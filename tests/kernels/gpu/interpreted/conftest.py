"""Fixtures of the checks that run in Triton's interpreter (see `tests/kernels/gpu/test_interpreter.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tenora_kernels.gpu import configs


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that tiny shapes take several of every kind, and three planes, one of them perhaps empty."""

    def shrunk(choose: Callable[..., configs.Tiles]) -> Callable[..., configs.Tiles]:
        def tiles(*args: Any) -> configs.Tiles:
            chosen = choose(*args)
            return dataclasses.replace(chosen, rb=16, bn=32, bk=min(chosen.bk, 16))

        return tiles

    for name in ("decode_tiles", "prefill_tiles", "expand_tiles", "wgrad_tiles"):
        monkeypatch.setattr(configs, name, shrunk(getattr(configs, name)))
    monkeypatch.setattr(configs, "splits_of", lambda k_size, small: 3)


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is a large one."""
    monkeypatch.setattr(configs, "DECODE_ROWS", 0)
