"""What a client sent comes back in an error in a few words at most, and whatever it is the error is JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Service, upload
from tests.support.full import full_but

LONG = "z" * 900_000
LONE = "\ud800"
MOST = 8192  # bytes of an error
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m",
        "adapter_id": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
            {"role": "assistant", "content": "x"},
        ],
        "stop": ["s"],
        "logit_bias": {"5": 1},
        "user": "u",
        "metadata": {"key": "value"},
        "response_format": {"type": "text"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "temperature": 1,
        "stream": False,
    },
    "/v1/completions": {"model": "m", "adapter_id": "m", "prompt": ["hi"], "stop": "s", "user": "u", "seed": 1, "n": 1},
    "/v1/fine_tuning/jobs": {
        "model": "m",
        "training_file": "f",
        "validation_file": "f",
        "suffix": "s",
        "name": "n",
        "metadata": {"key": "value"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
        "hyperparameters": {"batch_size": "auto"},
        "lora": {"rank": 4, "target_modules": ["q_proj"]},
        "integrations": [{"type": "wandb"}],
    },
    "/v1/adapters/a/rollback": {"version": "1"},
    "/v1/load_lora_adapter": {"lora_name": "n", "lora_path": "p"},
    "/v1/unload_lora_adapter": {"lora_name": "n"},
}


def variants(body: Any, text: str) -> Iterator[tuple[str, Any]]:
    """`body` with `text` for one of its values or names, and with a field of that name more, for each place in it."""
    for where in places(body, ()):
        yield f"{where}", replaced(body, where, text)
        if where and isinstance(where[-1], str):
            yield f"{where} renamed", renamed(body, where, text)
    yield "one more", {**body, text: 1}


def places(value: Any, where: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*where, key)
        yield from places(inner, (*where, key))


def parent(body: Any, where: tuple[Any, ...]) -> Any:
    for key in where[:-1]:
        body = body[key]
    return body


def replaced(body: Any, where: tuple[Any, ...], text: str) -> Any:
    copied = copy.deepcopy(body)
    parent(copied, where)[where[-1]] = text
    return copied


def renamed(body: Any, where: tuple[Any, ...], text: str) -> Any:
    copied = copy.deepcopy(body)
    inside = parent(copied, where)
    inside[text] = inside.pop(where[-1])
    return copied


def is_a_short_error(response: httpx.Response) -> bool:
    """Or a success, which may say what was asked for."""
    if response.status_code < 400:
        return True
    error = json.loads(response.content)["error"]
    return 400 <= response.status_code < 500 and len(response.content) <= MOST and bool(error["message"])


@pytest.mark.parametrize(
    "text",
    full_but([LONG, LONE], [LONG, LONE, LONG + LONE, "é" * 400_000, "\x00\x1b[2J"]),
    ids=lambda text: ascii(text)[:12],
)
@pytest.mark.parametrize("path", BODIES)
async def test_no_field_of_a_body_comes_back_whole(service: Service, path: str, text: str) -> None:
    client = service.client()
    wrong = {}
    for where, body in variants(BODIES[path], text):
        response = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        if not is_a_short_error(response):
            wrong[where[:200]] = response.status_code, len(response.content), response.text[:200]
    assert wrong == {}


def form_error(response: httpx.Response) -> str:
    """What is wrong with the answer to a form that cannot be right; empty if nothing is."""
    if 400 <= response.status_code < 500 and len(response.content) <= MOST and response.json()["error"]["message"]:
        return ""
    return f"{response.status_code}, {len(response.content)} bytes: {response.text[:200]}"


@pytest.mark.parametrize("text", full_but(LONE, [LONG, LONE, LONE + LONG]), ids=["long", "lone", "both"])
async def test_no_part_of_an_adapter_comes_back_whole(
    service: Service, make_adapter: Callable[..., Path], text: str
) -> None:
    client = service.client("adapters")
    directory = make_adapter()
    good = json.loads((directory / "adapter_config.json").read_text())
    weights = (directory / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    header, rest = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    shapes = {**good, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "layers_to_transform": [0]}
    wrong = {}
    for where, config in variants(shapes, text):
        files = {"adapter_config": ("c", json.dumps(config)), "adapter_model": ("m", weights)}
        response = await client.post("/v1/adapters", data={"name": "a"}, files=files)
        if response.status_code != 201 and (found := form_error(response)):  # notes of other tools are nobody's matter
            wrong[where[:100]] = found
    for where, changed in variants(header, text):
        encoded = json.dumps(changed).encode()
        damaged = len(encoded).to_bytes(8, "little") + encoded + rest
        files = {"adapter_config": ("c", json.dumps(good)), "adapter_model": ("m", damaged)}
        response = await client.post("/v1/adapters", data={"name": "a"}, files=files)
        if response.status_code != 201 and (found := form_error(response)):
            wrong[where[:100]] = found
    assert wrong == {}


@pytest.mark.parametrize("text", [LONG, LONE], ids=["long", "lone"])
async def test_no_row_of_a_training_file_comes_back_whole(service: Service, text: str) -> None:
    client = service.client("train")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    wrong = {}
    for where, changed in variants(row, text):
        response = await upload(client, json.dumps(changed) + "\n")
        answers = [response]
        if response.status_code == 200:
            answers += [
                await client.get(f"/v1/files/{response.json()['id']}"),
                await client.post(f"/v1/files/{response.json()['id']}/preview", json={}),
            ]
        for answer in answers:
            if answer.status_code >= 500 or (answer.status_code >= 400 and form_error(answer)):
                wrong[where[:100]] = f"{answer.request.url.path} {answer.status_code} {answer.text[:200]}"
    assert wrong == {}


async def test_neither_a_path_nor_a_query_nor_a_header_comes_back_whole(service: Service) -> None:
    client = service.client()
    paths = [route.path for route in service.app.routes if "{" in getattr(route, "path", "")]
    strange = ["z" * 4000, "%ED%A0%80", "%F0%9F%98", "a%00b", "%1b%5b2J"]
    wrong = {}
    for path in paths:
        for text in strange:
            url = "/".join(text if part.startswith("{") else part for part in path.split("/"))
            for method in ("GET", "POST", "DELETE"):
                response = await client.request(method, url, content=b"{}", headers={"idempotency-key": "k" * 9000})
                if response.status_code >= 400 and (found := form_error(response)):
                    wrong[f"{method} {url[:100]}"] = found
    for text in strange:
        for query in (f"after={text}", f"{text}=1", f"limit={text}", f"metadata[{text}]={text}", f"order={text}"):
            for path in ("/v1/files", "/v1/fine_tuning/jobs"):
                response = await client.get(f"{path}?{query}")
                if response.status_code >= 400 and (found := form_error(response)):
                    wrong[f"{path}?{query[:100]}"] = found
    assert wrong == {}


async def test_no_field_of_a_form_comes_back_whole(service: Service) -> None:
    client = service.client("train")
    for text in (b"z" * 900_000, b"\xed\xa0\x80", b"\xff\xfe", b"\x00", b'"' * 100):
        for name, filename, value in ((text, None, b"x"), (b"purpose", None, text), (b"file", text, b"x")):
            label = b'form-data; name="' + name + b'"' + (b'; filename="' + filename + b'"' if filename else b"")
            body = b"--b\r\ncontent-disposition: " + label + b"\r\n\r\n" + value + b"\r\n--b--\r\n"
            response = await client.post(
                "/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"}
            )
            assert form_error(response) == "", label[:100]
