"""Compiled kernels of earlier versions go, those of services that run stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tenora.cli import kernel_cache
from tenora.cli.kernel_cache import KEPT_SECONDS, kernels_in_use
from tenora_kernels.cpu.runtime import cache


def version(root: Path, letter: str, age: float) -> Path:
    """The kernels of a version that was last started so long ago."""
    directory = root / f"kernels-{letter * 16}"
    directory.mkdir()
    (directory / "gemm.nbi").write_bytes(b"compiled")
    os.utime(directory, (time.time() - age,) * 2)
    return directory


def start(monkeypatch: pytest.MonkeyPatch, directory: Path | None) -> None:
    monkeypatch.setattr(cache, "writable", lambda: directory)
    with kernels_in_use():
        pass


def test_long_unused_kernels_of_other_versions_are_removed_at_a_start_and_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, old = version(tmp_path, "a", 2 * KEPT_SECONDS), version(tmp_path, "b", 2 * KEPT_SECONDS)
    recent = version(tmp_path, "c", KEPT_SECONDS / 2)
    others = [tmp_path / name for name in ("__pycache__", "kernels-mine", "kernels.py")]
    for other in others:
        other.mkdir()
        os.utime(other, (0, 0))
    caplog.set_level("INFO", kernel_cache.__name__)
    start(monkeypatch, own)
    assert set(tmp_path.iterdir()) == {own, recent, *others}
    assert [record.__dict__["directory"] for record in caplog.records] == [str(old)]


def test_the_kernels_of_a_service_that_runs_stay_however_long_ago_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = version(tmp_path, "a", 0), version(tmp_path, "b", 0)
    monkeypatch.setattr(cache, "writable", lambda: old)
    with kernels_in_use():
        os.utime(old, (0, 0))
        start(monkeypatch, new)
        assert (old / "gemm.nbi").exists()
    os.utime(old, (0, 0))
    start(monkeypatch, new)
    assert not old.exists()


def test_each_start_counts_as_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = version(tmp_path, "a", 2 * KEPT_SECONDS)
    start(monkeypatch, own)
    os.utime(own, (0, 0))
    start(monkeypatch, own)
    start(monkeypatch, version(tmp_path, "b", 0))
    assert own.exists()


def test_nothing_is_removed_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, None)
