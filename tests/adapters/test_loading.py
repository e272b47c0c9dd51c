"""Adapters whose bytes are hashed on a thread of their own while they are used."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from tenora.adapters import peft_format
from tenora.adapters.digest import WEIGHTS_NAME, content_hasher, digest_of
from tenora.adapters.peft_format import AdapterReader
from tenora.adapters.weights import AdapterWeights
from tenora.errors import AdapterDamagedError, AdapterFormatError
from tests.adapters import files
from tests.support.patience import PATIENCE


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """An adapter of some megabytes, read in several pieces."""
    return files.save(tmp_path / "stored", files.config(r=2048), files.tensors(rank=2048))


@pytest.fixture
def reader() -> AdapterReader:
    return AdapterReader(files.ROWS, max_rank=4096)


class HashingOnceUsed:
    """A hasher that takes no weights before somebody has used them."""

    def __init__(self, config: bytes, used: threading.Event) -> None:
        self._hasher = content_hasher(config)
        self._used = used

    def update(self, part: bytes) -> None:
        assert self._used.wait(PATIENCE)
        self._hasher.update(part)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def test_an_adapter_is_used_while_its_bytes_are_still_hashed(
    reader: AdapterReader, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = threading.Event()
    digest = digest_of(stored)
    assert digest is not None
    monkeypatch.setattr(peft_format, "content_hasher", lambda config: HashingOnceUsed(config, used))
    modules = reader.load(stored, digest, lambda weights: (used.set(), weights.modules)[1])
    expected = reader.read(stored).modules
    assert modules.keys() == expected.keys()
    for path, module in modules.items():
        np.testing.assert_array_equal(module.a, expected[path].a, strict=True)


@pytest.mark.parametrize("place", [-1, -(2**20), -(3 * 2**20)])
def test_nothing_is_returned_of_weights_that_turn_out_to_be_others(
    reader: AdapterReader, stored: Path, place: int
) -> None:
    digest = digest_of(stored)
    assert digest is not None
    weights = bytearray((stored / WEIGHTS_NAME).read_bytes())
    weights[place] ^= 0x80
    (stored / WEIGHTS_NAME).write_bytes(weights)
    used: list[AdapterWeights] = []
    with pytest.raises(AdapterDamagedError, match=digest[:12]):
        reader.load(stored, digest, used.append)
    assert used  # the difference is found at the end; who used them is not answered


def test_what_cannot_be_used_is_told_as_it_is_if_its_bytes_are_right(reader: AdapterReader, stored: Path) -> None:
    def refuse(_: AdapterWeights) -> None:
        raise AdapterFormatError("The adapter holds values beyond float16.")

    digest = digest_of(stored)
    assert digest is not None
    with pytest.raises(AdapterFormatError, match="beyond float16"):
        reader.load(stored, digest, refuse)
    with pytest.raises(AdapterDamagedError):
        reader.load(stored, hashlib.sha256().hexdigest(), refuse)


def test_a_hasher_that_fails_lets_nothing_through(
    reader: AdapterReader, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(HashingOnceUsed):
        def update(self, part: bytes) -> None:
            if len(part) >= 2**20:
                raise MemoryError
            self._hasher.update(part)

    monkeypatch.setattr(peft_format, "content_hasher", lambda config: Failing(config, threading.Event()))
    with pytest.raises(MemoryError):
        reader.load(stored, "0" * 64, lambda weights: weights)
