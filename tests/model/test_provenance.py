"""A base's source is one that a reader can get and check."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tenora.model.catalog import CATALOGUE, ResolvedModel
from tenora.model.provenance import base_source


def test_a_directory_is_known_by_the_hashes_of_its_weights(tmp_path: Path) -> None:
    for name, content in (("model-1.safetensors", b"one"), ("model-2.safetensors", b"two"), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    found = base_source(ResolvedModel(tmp_path, tmp_path.name))
    assert (found.kind, found.source, found.revision) == ("directory", tmp_path.name, None)
    assert found.weights == {
        "model-1.safetensors": hashlib.sha256(b"one").hexdigest(),
        "model-2.safetensors": hashlib.sha256(b"two").hexdigest(),
    }


def test_a_hub_model_is_known_by_its_commit(tiny_base: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    directory = Path(shutil.copytree(tiny_base, tmp_path / "snapshots" / commit))
    found = base_source(ResolvedModel(directory, "owner/name"))
    assert (found.kind, found.source, found.revision) == ("hub", "owner/name", commit)


def test_a_model_of_the_catalogue_is_known_by_its_wheel(tiny_base: Path) -> None:
    entry = CATALOGUE["smollm2-135m"]
    found = base_source(ResolvedModel(tiny_base, "smollm2-135m"))
    assert (found.source, found.member, found.revision) == (entry.requirement, entry.member, entry.sha256)
    assert "==" in found.source  # pinned, as pip takes it
