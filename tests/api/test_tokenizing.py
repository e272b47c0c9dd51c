"""Long prompts: refused by their length, on threads of their own, and left when nobody waits for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tenora.api.schemas.completions import as_prompts
from tenora.control.tokenizing.threads import SHORT
from tests.api.asgi import Call
from tests.api.conftest import Service, upload

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Watched:
    """The tokenizers library's object, which says what it is given and waits inside of texts with the word."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.lengths: list[int] = []
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.lengths.append(len(text))
        if "slowly" in text:
            self.begun.set()
            self.may_end.wait()
        return self.backend.encode(text, **options)


@pytest.fixture(scope="module")
def waiting() -> Iterator[list[Watched]]:
    """All of them: some wait longer than their service lives."""
    made: list[Watched] = []
    yield made
    for each in made:
        each.may_end.set()


@pytest.fixture
def backend(service: Service, waiting: list[Watched]) -> Watched:
    tokenizer = service.control.inference.tokenizer
    watched = tokenizer._backend = Watched(tokenizer._backend)
    waiting.append(watched)
    return watched


def body(service: Service, **fields: Any) -> dict[str, Any]:
    return {"model": service.control.inference.base_id, "max_tokens": 1, **fields}


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(service: Service, backend: Watched) -> None:
    """The context holds 512 tokens; less than its length in characters is looked at."""
    word = "the quick brown "
    conversation = [{"role": "user", "content": word * 400_000}]
    client = service.client("infer")
    for path, fields, param in (
        (TEXT, {"prompt": word * 400_000}, "prompt"),
        (TEXT, {"prompt": ["short", word * 400_000]}, "prompt"),
        (CHAT, {"messages": conversation}, "messages"),
        (TEXT, {"prompt": [5] * 400_000}, "prompt"),
        (TEXT, {"prompt": [5] * 400_000 + ["no id"]}, "prompt"),
        (TEXT, {"prompt": [[1, 2], [5] * 9000]}, "prompt"),
        # 16 kB are within 512 times the longest token, and still far too long: known from the first pieces.
        (TEXT, {"prompt": "x!" * 8000}, "prompt"),
    ):
        error = (await client.post(path, json=body(service, **fields))).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert "Shorten it" in error["message"]
    assert sum(backend.lengths) < 20_000
    assert service.script.requests == []


class Unread(list[int]):
    """Token ids that nobody may go through yet."""

    def __iter__(self) -> Iterator[int]:
        pytest.fail("they are looked at before they are counted")


def test_token_ids_are_not_looked_at_where_all_requests_pass() -> None:
    ids = Unread([5] * 3)
    assert as_prompts(ids) == [ids]
    assert as_prompts([ids, ids]) == [ids, ids]


@pytest.mark.parametrize("wrong", ["no id", 1.5, True, None, [6], -1, 2**40])
async def test_what_is_no_token_id_is_refused_wherever_it_stands(service: Service, wrong: object) -> None:
    client = service.client("infer")
    for prompt in [wrong, 5], [5, wrong], [[5], [5, wrong]], [[5], [wrong, 5]]:
        answer = await client.post(TEXT, json=body(service, prompt=prompt))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt"), answer.text
    assert service.script.requests == []


async def test_a_long_prompt_holds_up_nobodys_short_one(service: Service, backend: Watched) -> None:
    """Its thread waits inside the library, as for a text of megabytes."""
    long = [Call(service, TEXT, body(service, prompt=["slowly", "a" * 70_000])) for _ in range(8)]
    await asyncio.to_thread(backend.begun.wait)
    for tenant in ("default", "other"):
        client = service.client("infer", tenant)
        answer = await client.post(CHAT, json=body(service, messages=[{"role": "user", "content": "Hi"}]))
        assert answer.status_code == 200
    backend.may_end.set()
    for call in long:
        await call.finished()


async def test_a_conversation_is_as_long_as_all_that_its_template_sees(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and roles, not contents alone, decide whether it takes the threads of short prompts."""
    tokenizing = service.control.inference.tokenizing
    prompt, lengths = tokenizing.prompt, list[int]()

    async def noted(share_group: str, characters: int, work: Any) -> Any:
        lengths.append(characters)
        return await prompt(share_group, characters, work)

    monkeypatch.setattr(tokenizing, "prompt", noted)
    turns = [{"role": "user", "name": "n" * 64, "content": "Hi"}] * 700
    client = service.client("infer")
    assert (await client.post(CHAT, json=body(service, messages=turns))).status_code == 400
    assert (await client.post(CHAT, json=body(service, messages=turns[:1]))).status_code == 200
    assert 700 * 70 < SHORT < lengths[0]
    assert lengths[1] < 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_client_that_leaves_takes_its_prompts_with_it(service: Service, backend: Watched, path: str) -> None:
    fields = (
        {"prompt": ["slowly", *["never"] * 200]}
        if path == TEXT
        else {"messages": [{"role": "user", "content": "slowly"}]}
    )
    call = Call(service, path, body(service, **fields))
    await asyncio.to_thread(backend.begun.wait)
    call.leave()
    await call.finished()
    assert service.app.state.lifecycle.open == 0
    backend.may_end.set()
    answer = await service.client("infer").post(TEXT, json=body(service, prompt="Hi"))
    assert answer.status_code == 200
    assert len(backend.lengths) < 200  # the prompts after the one that ran were not begun
    assert len(service.script.requests) == 1


async def test_the_end_of_the_grace_waits_for_no_prompt(service: Service, backend: Watched) -> None:
    call = Call(service, TEXT, body(service, prompt="slowly"))
    await asyncio.to_thread(backend.begun.wait)
    service.app.state.lifecycle.begin_drain()
    service.app.state.lifecycle.expired.set()
    await call.finished()
    assert "shutting_down" in call.text
    # The service ends now, with the thread still inside the library.


async def test_a_preview_ends_with_its_client(service: Service, backend: Watched) -> None:
    row = '{{"messages": [{{"role": "user", "content": "{}"}}, {{"role": "assistant", "content": "A quick one."}}]}}\n'
    rows = row.format("slowly") + row.format("Define: fox.") * 50
    file = (await upload(service.client("train"), rows)).json()
    call = Call(service, f"/v1/files/{file['id']}/preview", {"limit": 51}, scope="train")
    await asyncio.to_thread(backend.begun.wait)
    call.leave()
    await call.finished()
    backend.may_end.set()
    answer = await service.client("train").post(f"/v1/files/{file['id']}/preview", json={"limit": 1})
    assert answer.status_code == 200
    assert len(backend.lengths) < 50
