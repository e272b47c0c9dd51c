"""The store: content-addressed, immutable, and whole whatever kills its writer."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tenora.adapters.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from tenora.adapters.store import AdapterStore, canonical_config
from tenora.errors import AdapterFormatError, NotFoundError, StorageFullError
from tests.adapters.files import ROWS, config, save, tensors
from tests.support.patience import PATIENCE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", config(), tensors())


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def staging(store_root: Path) -> list[Path]:
    return list((store_root / "staging").iterdir())


def test_round_trip(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    (source / "evil.py").write_text("raise SystemExit")
    digest = store.put(source)
    assert len(digest) == 64
    assert store.exists(digest)
    assert store.list() == (digest,)
    assert store.verify(digest)
    assert sorted(path.name for path in store.path(digest).iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert (store.path(digest) / WEIGHTS_NAME).read_bytes() == (source / WEIGHTS_NAME).read_bytes()
    assert json.loads((store.path(digest) / CONFIG_NAME).read_text()) == config()
    assert store.size(digest) == sum(path.stat().st_size for path in store.path(digest).iterdir())
    reference = store.ref(digest)
    assert (reference.digest, reference.path) == (digest, str(store.path(digest)))
    assert read_adapter(Path(reference.path), ROWS, max_rank=4).rank == 4
    assert staging(tmp_path / "store") == []


def test_equal_content_is_stored_once(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    digest = store.put(source)
    before = store.path(digest).stat()
    assert store.put(source) == digest
    reordered = save(tmp_path / "reordered", dict(reversed(config().items())), tensors())
    assert store.put(reordered) == digest
    assert store.path(digest).stat() == before
    assert store.put(save(tmp_path / "other", config(lora_alpha=16), tensors())) != digest
    assert store.put(save(tmp_path / "third", config(), tensors(seed=1))) != digest
    assert len(store.list()) == 3


def test_the_order_of_patterns_is_content() -> None:
    first = canonical_config(b'{"rank_pattern": {"b": 1, "a": 2}, "r": 4}')
    assert first == canonical_config(b'{"r": 4,   "rank_pattern": {"b": 1, "a": 2}}')
    assert first != canonical_config(b'{"r": 4, "rank_pattern": {"a": 2, "b": 1}}')


def test_stored_files_are_read_only(store: AdapterStore, source: Path) -> None:
    digest = store.put(source)
    for path in store.path(digest).iterdir():
        assert path.stat().st_mode & 0o222 == 0


def test_damage_is_seen_and_repaired(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    digest = store.put(source)
    weights = store.path(digest) / WEIGHTS_NAME
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    assert not store.verify(digest)
    assert store.put(source) == digest
    assert store.verify(digest)
    assert staging(tmp_path / "store") == []
    (store.path(digest) / CONFIG_NAME).unlink()
    assert not store.verify(digest)


def test_delete(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    digest = store.put(source)
    with (store.path(digest) / WEIGHTS_NAME).open("rb") as still_open:
        assert store.delete(digest)
        assert still_open.read() == (source / WEIGHTS_NAME).read_bytes()
    assert not store.delete(digest)
    assert not store.exists(digest)
    assert not store.verify(digest)
    assert store.list() == ()
    assert staging(tmp_path / "store") == []
    with pytest.raises(NotFoundError):
        store.ref(digest)
    with pytest.raises(NotFoundError):
        store.size(digest)
    assert store.put(source) == digest


@pytest.mark.parametrize(
    "name", ["", "..", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "/" + "a" * 63]
)
def test_what_is_no_digest_is_no_path(name: str, store: AdapterStore) -> None:
    for call in (store.path, store.exists, store.delete, store.ref, store.verify):
        with pytest.raises(ValueError, match="is not a digest"):
            call(name)


def test_incomplete_directories_are_refused(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    (source / WEIGHTS_NAME).rename(tmp_path / "w")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors is missing"):
        store.put(source)
    (tmp_path / "w").rename(source / WEIGHTS_NAME)
    (source / CONFIG_NAME).write_text("{")
    with pytest.raises(AdapterFormatError, match="not valid JSON"):
        store.put(source)
    (source / CONFIG_NAME).unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is missing"):
        store.put(source)
    assert store.list() == ()
    assert staging(tmp_path / "store") == []


def test_a_full_disk_leaves_nothing(
    store: AdapterStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError, match="The disk is full"):
            store.put(source)
    assert store.list() == ()
    assert staging(tmp_path / "store") == []
    assert store.verify(store.put(source))


def test_many_writers_of_the_same(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    others = [AdapterStore(tmp_path / "store") for _ in range(3)]
    with ThreadPoolExecutor(4) as executor:
        digests = set(executor.map(lambda one: one.put(source), [store, *others] * 4))
    assert len(digests) == 1
    assert store.list() == tuple(digests)
    assert store.verify(digests.pop())
    assert staging(tmp_path / "store") == []


def test_data_reach_the_disk_before_the_name(
    store: AdapterStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files and their directory are flushed before the rename, the parent after it."""
    log: list[str] = []
    fsync: Callable[[int], None] = os.fsync
    rename = Path.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def logged_rename(self: Path, target: Path) -> Path:
        log.append(f"rename {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    digest = store.put(source)
    final = log.index(f"rename {digest}")
    assert {CONFIG_NAME, WEIGHTS_NAME, "new"} <= set(log[:final])
    assert digest[:2] in log[final:]


KILLED = """
import os, signal, sys
from pathlib import Path
from tenora.adapters.store import AdapterStore

steps, real = int(sys.argv[3]), os.fsync
def fsync(descriptor):
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
print(AdapterStore(Path(sys.argv[1])).put(Path(sys.argv[2])))
"""


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_a_killed_writer_leaves_all_or_nothing(step: int, source: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, str(root), str(source), str(step)]
    result = subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE)
    assert result.returncode == -signal.SIGKILL
    assert len(staging(root)) == 1, "the kill came too late to mean anything"
    store = AdapterStore(root)
    assert staging(root) == []
    for digest in store.list():
        assert store.verify(digest)
    assert store.verify(store.put(source))


def test_a_living_writer_keeps_its_staging(store: AdapterStore, tmp_path: Path) -> None:
    with store._private_directory() as private:
        assert AdapterStore(tmp_path / "store").collect_stale() == 0
        assert private.is_dir()
    assert not private.exists()
    (tmp_path / "store" / "staging" / "left" / "deep").mkdir(parents=True)
    assert store.collect_stale() == 1


def test_the_room_is_free_of_torch() -> None:
    code = (
        "import sys, tenora.adapters.store, tenora.adapters.peft_format, tenora.adapters.targets, tenora.adapters.ref;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
