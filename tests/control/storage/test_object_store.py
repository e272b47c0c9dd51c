"""What every place for files promises; one that is added stands in `STORES`."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenora.control.storage.directory import DirectoryStore
from tenora.control.storage.object_store import ObjectStore, put, writing
from tenora.errors import StorageFullError

STORES: dict[str, Callable[[Path], ObjectStore]] = {
    "directory": lambda root: DirectoryStore(root, root / "staging"),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    (tmp_path / "staging").mkdir()
    return STORES[request.param](tmp_path)


def read(store: ObjectStore, tenant: str, name: str) -> bytes | None:
    try:
        return Path(store.local(tenant, name)).read_bytes()
    except FileNotFoundError:
        return None


def listed(store: ObjectStore) -> set[tuple[str, str]]:
    return {(entry.tenant_id, entry.object_id) for entry in store.list()}


def test_an_object_is_found_when_it_is_whole_and_not_before(store: ObjectStore, tmp_path: Path) -> None:
    with writing(store) as incoming:
        for chunk in (b"ab", b"", b"c"):
            incoming.write(chunk)
        assert Path(incoming.local).read_bytes() == b"abc"
        assert (read(store, "acme", "one"), listed(store)) == (None, set())
        incoming.keep("acme", "one")
        assert (incoming.size, incoming.sha256) == (3, hashlib.sha256(b"abc").hexdigest())
    assert (read(store, "acme", "one"), listed(store)) == (b"abc", {("acme", "one")})
    assert list((tmp_path / "staging").iterdir()) == []


def test_of_what_fails_half_way_nothing_is_left(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        put(store, "acme", "one", content())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StorageFullError):
        put(store, "acme", "one", [b"x"])
    assert listed(store) == set()
    assert list((tmp_path / "staging").iterdir()) == []


def test_deleting_takes_one_object_or_all_of_one_tenant(store: ObjectStore) -> None:
    for tenant, name in (("acme", "one"), ("acme", "two"), ("umbrella", "one")):
        assert put(store, tenant, name, [tenant.encode()]) == (len(tenant), hashlib.sha256(tenant.encode()).hexdigest())
    with Path(store.local("acme", "one")).open("rb") as reading:
        store.delete("acme", "one")
        assert reading.read() == b"acme"  # whoever has it open keeps reading it
    store.delete("acme", "one")
    assert listed(store) == {("acme", "two"), ("umbrella", "one")}
    store.delete_all("acme")
    store.delete_all("nobody")
    assert listed(store) == {("umbrella", "one")}
    assert read(store, "umbrella", "one") == b"umbrella"
