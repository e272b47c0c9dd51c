"""/v1/files: the SDK's shape, uploads that stream, limits, idempotency."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tenora.config import Settings
from tests.api.asgi import Call
from tests.api.conftest import TRAINING_ROWS, Service, upload


async def test_life_of_a_file(service: Service) -> None:
    client = service.client("train")
    created = (await upload(client)).json()
    assert created == {
        "id": created["id"],
        "object": "file",
        "bytes": len(TRAINING_ROWS),
        "created_at": created["created_at"],
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
    path = f"/v1/files/{created['id']}"
    assert (await client.get(path)).json() == created
    content = await client.get(f"{path}/content")
    assert content.text == TRAINING_ROWS
    assert 'filename="train.jsonl"' in content.headers["content-disposition"]
    assert (await client.delete(path)).json() == {"id": created["id"], "object": "file", "deleted": True}
    assert (await client.get(path)).status_code == 404
    assert (await client.get(f"{path}/content")).status_code == 404


async def test_a_file_with_bad_rows_says_which(service: Service) -> None:
    answer = (await upload(service.client("train"), TRAINING_ROWS + "{not json}\n")).json()
    assert answer["status"] == "error"
    assert "13" in answer["status_details"]


async def test_pages(service: Service) -> None:
    client = service.client("train")
    ids = [(await upload(client)).json()["id"] for _ in range(3)]
    newest = (await client.get("/v1/files?limit=2")).json()
    assert [file["id"] for file in newest["data"]] == ids[:0:-1]
    assert (newest["object"], newest["has_more"], newest["last_id"]) == ("list", True, ids[1])
    rest = (await client.get(f"/v1/files?limit=2&after={newest['last_id']}")).json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    oldest = (await client.get("/v1/files?order=asc")).json()
    assert [file["id"] for file in oldest["data"]] == ids
    assert (await client.get("/v1/files?purpose=other")).json()["data"] == []


async def test_expiry(service: Service) -> None:
    client = service.client("train")
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    answer = (await upload(client, **fields)).json()
    assert answer["expires_at"] == answer["created_at"] + 3600
    for wrong in ("3599", "2592001", "soon", "9" * 40):
        refused = await upload(client, **{**fields, "expires_after[seconds]": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expires_after[seconds]")
    half = await upload(client, **{"expires_after[seconds]": "3600"})
    assert half.json()["error"]["param"] == "expires_after[anchor]"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "fine-tune"}, "files": {}}, None),
        ({"data": {}, "files": {"file": ("a.jsonl", b"x")}}, "purpose"),
        ({"data": {"purpose": "fine-tune", "typo": "1"}, "files": {"file": ("a", b"x")}}, "typo"),
        ({"data": {"purpose": "fine-tune"}, "files": {"other": ("a", b"x")}}, "other"),
        ({"data": {"purpose": "x" * 5000}, "files": {"file": ("a", b"x")}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, "file"),
        ({"data": {"purpose": "fine-tune"}, "files": {"file": ("a", b"")}}, "file"),
    ],
)
async def test_refused_forms(service: Service, form: dict[str, Any], param: str | None) -> None:
    response = await service.client("train").post("/v1/files", **form)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert service.staged() == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"--b\r\n",
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune',
        b"--b\r\n" + b"X: y\r\n" * 10_000,
        b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--b--\r\n',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
    ],
)
async def test_malformed_forms(service: Service, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await service.client("train").post("/v1/files", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert service.staged() == []


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 900]
)
async def test_other_content_types(service: Service, kind: str) -> None:
    response = await service.client("train").post("/v1/files", content=b"{}", headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_form")


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\boot.ini", "/abs/name.jsonl", "a\x00b", "x" * 400])
async def test_a_filename_is_a_label(service: Service, name: str) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
        + name.encode()
        + b'"\r\n\r\n'
        + TRAINING_ROWS.encode()
        + b"\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = await service.client("train").post("/v1/files", content=body, headers=headers)
    assert response.status_code == 200, response.text
    shown = response.json()["filename"]
    assert not set(shown) & {"/", "\\", "\x00"}
    assert len(shown) <= 255


class TestLimits:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(
            home=tmp_path / "home", device="cpu", dtype="float32", max_file_bytes=4096, max_body_bytes=2048, threads=1
        )

    async def test_a_large_file_is_refused_while_it_arrives(self, service: Service) -> None:
        response = await upload(service.client("train"), "x" * 5000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
        assert service.staged() == []

    async def test_a_body_that_declares_its_size_is_not_read(self, service: Service) -> None:
        response = await service.client("train").post("/v1/chat/completions", content=b"x" * 4000)
        assert response.status_code == 413
        assert response.headers["connection"] == "close"

    async def test_a_body_without_a_size_is_cut_off_at_the_limit(self, service: Service) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < 10_000_000:
                sent += 1000
                yield b"x" * 1000

        headers = {"content-type": "application/json"}
        response = await service.client("infer").post("/v1/chat/completions", content=endless(), headers=headers)
        assert response.status_code == 413
        assert sent <= 4000

    async def test_the_limit_is_asked_for_after_the_key(self, service: Service) -> None:
        assert (await service.client_with(None).post("/v1/files", content=b"x" * 999_999)).status_code == 401


async def test_idempotency(service: Service) -> None:
    client = service.client("train")
    client.headers["idempotency-key"] = "upload-1"
    first, again = await upload(client), await upload(client)
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert again.headers["idempotency-replayed"] == "true"
    other = await upload(client, TRAINING_ROWS * 2)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    del client.headers["idempotency-key"]
    assert len((await client.get("/v1/files")).json()["data"]) == 1
    # Keys are a tenant's own.
    stranger = service.client("train", "other")
    stranger.headers["idempotency-key"] = "upload-1"
    assert (await upload(stranger)).json()["id"] != first.json()["id"]


async def test_a_failed_attempt_frees_its_key(service: Service) -> None:
    client = service.client("train")
    client.headers["idempotency-key"] = "upload-2"
    assert (await upload(client, "")).status_code == 400
    assert (await upload(client)).status_code == 200


async def test_a_malformed_key(service: Service) -> None:
    client = service.client("train")
    client.headers["idempotency-key"] = "x" * 300
    assert (await upload(client)).json()["error"]["code"] == "invalid_idempotency_key"


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(service: Service) -> None:
    begun = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 1000
    call = Call(service, "/v1/files", begun, scope="train", kind="multipart/form-data; boundary=b")
    while not service.staged():  # noqa: ASYNC110  # the state of a directory
        await asyncio.sleep(0.005)
    call.leave()
    await call.finished()
    assert service.staged() == []
    assert service.app.state.lifecycle.open == 0


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (("\ufeff" + TRAINING_ROWS).encode("utf-16-le"), "processed", None),
        (gzip.compress(TRAINING_ROWS.encode()), "processed", None),
        ("Frage;Antwort;Größe\na;b;c\n".encode("cp1252"), "error", "iconv -f WINDOWS-1252 -t UTF-8"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)), "error", "a JPEG image"),
        (b"\x80\x81,\xfe\n" * 9, "error", "not UTF-8"),
        (b"PAR1\x15\x00\xff\xfePAR1", "error", "Parquet file cannot be read"),
    ],
)
async def test_any_bytes_are_a_file_with_a_status_and_never_a_500(
    service: Service, content: bytes, status: str, words: str | None
) -> None:
    client = service.client("train")
    answer = await client.post(
        "/v1/files", files={"file": ("rows", content)}, data={"purpose": "fine-tune"}, timeout=None
    )
    assert answer.status_code == 200
    made = answer.json()
    assert made["status"] == status
    assert made["status_details"] is None if words is None else words in made["status_details"]
    kept = await client.get(f"/v1/files/{made['id']}/content")
    assert kept.content == content


async def test_a_conversation_that_the_assistant_opens_is_told_at_upload(service: Service) -> None:
    """Not when a job reads the file: the template is at hand. An opening that is not learned is part of the prompt."""
    client = service.client("train")
    greeting = '{"role": "assistant", "content": "Hello."%s}'
    rest = '{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "A quick one."}'
    for weight, status in (("", "error"), (', "weight": 0', "processed")):
        row = f'{{"messages": [{greeting % weight}, {rest}]}}\n'
        file = (await upload(client, row * 3)).json()
        assert file["status"] == status
    refused = (await client.get("/v1/files")).json()["data"][-1]
    assert "line 1: ambiguous_format: The conversation begins with an assistant message" in refused["status_details"]
    assert "`weight` 0" in refused["status_details"]
