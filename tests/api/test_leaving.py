"""Uploads, imports and loads end with their client, and nothing of them stays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenora.config import Settings
from tenora.control.files import files
from tests.api.asgi import Call
from tests.api.conftest import Service
from tests.support.patience import PATIENCE

ROWS = b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}\n' * 20
FILE = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", ROWS)}}


class Slow:
    """Work on a thread that waits, the first time, until it may go on."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.ended = 0
        self._work = work

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.begun.is_set():
            self.begun.set()
            assert self.may_end.wait(PATIENCE)
        try:
            return self._work(*arguments, **options)
        finally:
            self.ended += 1


def sent(service: Service, path: str, form: dict[str, Any], key: bytes) -> Call:
    """A whole form, with an Idempotency-Key."""
    request = httpx.Request("POST", "http://tenora.test", **form)
    call = Call(service, path, request.read(), scope="admin", kind=request.headers["content-type"])
    call._complete = True
    call._scope["headers"].append((b"idempotency-key", key))
    return call


async def left_while(slow: Slow, call: Call, service: Service) -> None:
    """The client goes away while the work is done, and its request is over at once."""
    await asyncio.to_thread(slow.begun.wait)
    call.leave()
    await call.finished()
    assert service.app.state.lifecycle.open == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(0.01)


async def test_an_upload_ends_with_its_client_and_may_be_repeated(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(files.validate_file)
    monkeypatch.setattr(files, "validate_file", slow)
    call = sent(service, "/v1/files", FILE, b"upload-1")
    await left_while(slow, call, service)
    staging = service.control.files._storage.stage().parent
    assert list(staging.iterdir()) == []
    slow.may_end.set()
    client = service.client("admin")
    assert (await client.get("/v1/files")).json()["data"] == []
    again = await client.post("/v1/files", **FILE, headers={"Idempotency-Key": "upload-1"})
    assert (again.status_code, again.json()["status"]) == (200, "processed")
    assert "idempotency-replayed" not in again.headers


async def test_an_import_ends_with_its_client_and_may_be_repeated(
    service: Service, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_adapter()
    names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
    parts = {field: (name, (directory / name).read_bytes()) for field, name in names.items()}
    adapter_form = {"data": {"name": "desk"}, "files": parts}
    store = service.control._blobs.store
    slow = Slow(store.put)
    monkeypatch.setattr(store, "put", slow)
    call = sent(service, "/v1/adapters", adapter_form, b"import-1")
    await left_while(slow, call, service)
    slow.may_end.set()
    await until(lambda: slow.ended == 1)
    client = service.client("admin")
    assert (await client.get("/v1/adapters")).json()["data"] == []
    await until(lambda: store.list() == ())
    again = await client.post("/v1/adapters", **adapter_form, headers={"Idempotency-Key": "import-1"})
    assert again.status_code == 201, again.text
    assert "idempotency-replayed" not in again.headers


class TestLoading:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(home=tmp_path / "home", device="cpu", dtype="float32", adapter_dirs=(tmp_path,), threads=1)

    async def test_a_load_from_a_directory_ends_with_its_client_and_may_be_repeated(
        self, service: Service, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body = {"lora_name": "desk", "lora_path": str(make_adapter())}
        store = service.control._blobs.store
        slow = Slow(store.put)
        monkeypatch.setattr(store, "put", slow)
        await left_while(slow, Call(service, "/v1/load_lora_adapter", body, scope="admin"), service)
        slow.may_end.set()
        await until(lambda: slow.ended == 1)
        client = service.client("admin")
        assert (await client.get("/v1/adapters")).json()["data"] == []
        await until(lambda: store.list() == ())
        again = await client.post("/v1/load_lora_adapter", json=body)
        assert again.status_code == 200, again.text
