"""Checkpoints of a run on disk: who else reads them meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tenora.training import checkpoint
from tenora.training.checkpoint import checkpoint_path, prune_checkpoints


def test_who_reads_a_checkpoint_finds_all_of_it_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    remove = shutil.rmtree

    def noted(path: Path, **settings: Any) -> None:
        removed.extend([path.name] if path.exists() else [])
        remove(path, **settings)

    for step in (1, 2, 3, 4, 5):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        (checkpoint_path(tmp_path, step) / "adapter_config.json").write_text("{}")
    half = tmp_path / "checkpoints" / ".step-000006-x"
    half.mkdir()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", noted)
    prune_checkpoints(tmp_path, best_step=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        checkpoint_path(tmp_path, step).name for step in (2, 3, 4, 5)
    }
    assert sorted(removed) == [".removed-step-000001", half.name]
