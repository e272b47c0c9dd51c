"""POST /v1/completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tenora.api.routes.completions import LegacyLogprobs
from tenora.api.schemas.completions import CompletionRequest
from tenora.control.inference.records import LogprobEntry
from tests.api.conftest import SPEECH, Service


async def complete(service: Service, prompt: Any = "Say", **fields: Any) -> httpx.Response:
    body = {"model": service.control.inference.base_id, "prompt": prompt, **fields}
    return await service.client("infer").post("/v1/completions", json=body)


async def test_an_answer(service: Service, base_id: str) -> None:
    response = await complete(service, model=base_id)
    answer = response.json()
    assert response.status_code == 200, response.text
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", base_id)
    [choice] = answer["choices"]
    assert SPEECH.startswith(choice["text"])
    assert answer["usage"]["completion_tokens"] == 16  # OpenAI's default
    assert "prompt_logprobs" not in choice


@pytest.mark.parametrize(
    ("prompt", "count"), [("Say", 1), (["Say", "Tell"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8, 9]], 3)]
)
async def test_forms_of_prompts(service: Service, prompt: Any, count: int) -> None:
    response = await complete(service, prompt, n=2, max_tokens=2)
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(2 * count))
    assert len(service.script.requests) == 2 * count
    if isinstance(prompt[0], list):
        assert sorted(request.token_ids for request in service.script.requests) == sorted(prompt * 2)
    assert response.json()["usage"]["completion_tokens"] == 4 * count


async def test_echo_with_logprobs(service: Service) -> None:
    response = await complete(service, "The dog.", echo=True, logprobs=1, max_tokens=2)
    [choice] = response.json()["choices"]
    assert choice["text"] == "The dog." + choice["text"][len("The dog.") :]
    logprobs = choice["logprobs"]
    lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert lengths == {len(service.script.requests[0].token_ids) + 2}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][:2] == [None, -0.5]
    assert logprobs["top_logprobs"][0] is None
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert "prompt_logprobs" not in choice


async def test_a_token_never_shows_anothers_value(service: Service) -> None:
    """Parts of a character all read as U+FFFD: here they are alternatives to each other."""
    tokenizer = service.control.inference.tokenizer
    smile = tokenizer.encode("🙂")
    assert len(smile) > 2
    service.script.tokens = smile
    service.script.alternatives = [*smile, 7, 8, 9]
    response = await complete(service, logprobs=5, max_tokens=len(smile))
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token)) for token in smile
    ]
    for token, value, place in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert place[token] == value
        assert len(place) == 5
        assert len(set(place.values())) == 5


async def test_tokens_that_read_the_same_are_told_apart_by_their_ids(service: Service) -> None:
    entry = LogprobEntry(
        5, "a", b"a", -1.0, ((5, "a", b"a", -1.0), (9, "a", b"a", -2.0), (7, "\ufffd", b"\xef\xbf\xbd", -3))
    )
    shape = LegacyLogprobs(3)
    shape.add([entry])
    assert shape.shaped.top_logprobs == [{"a": -1.0, "token_id:9": -2.0, "\ufffd": -3.0}]
    ids = LegacyLogprobs(3, as_ids=True)
    ids.add([entry])
    assert ids.shaped.tokens == ["token_id:5"]
    assert ids.shaped.top_logprobs == [{"token_id:5": -1.0, "token_id:9": -2.0, "token_id:7": -3.0}]


@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_point_at_the_tokens_first_characters(service: Service, stream: bool) -> None:
    tokenizer = service.control.inference.tokenizer
    text = "é🙂 fox 東a"
    service.script.tokens = tokenizer.encode(text)
    response = await complete(service, logprobs=0, max_tokens=len(service.script.tokens), stream=stream)
    parts = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")] or [
        response.json()
    ]
    offsets = [
        offset for part in parts for offset in (part["choices"][0]["logprobs"] or {"text_offset": []})["text_offset"]
    ]
    assert offsets == starts(service, service.script.tokens, text)


async def test_offsets_of_an_echoed_prompt_and_what_follows_it(service: Service) -> None:
    prompt, text = "🙂a é", "東 fox"
    tokenizer = service.control.inference.tokenizer
    service.script.tokens = tokenizer.encode(text)
    for given in (prompt, tokenizer.encode(prompt)):
        response = await complete(service, given, echo=True, logprobs=1, max_tokens=len(service.script.tokens))
        [choice] = response.json()["choices"]
        assert choice["text"] == prompt + text
        ids = [*tokenizer.encode(prompt), *service.script.tokens]
        assert choice["logprobs"]["text_offset"] == starts(service, ids, prompt + text)


def starts(service: Service, ids: Sequence[int], text: str) -> list[int]:
    """By bytes: the character of the text in which each token's first byte lies."""
    character = [place for place, letter in enumerate(text) for _ in letter.encode()]
    lengths = [len(service.control.inference.tokenizer.token_bytes(token)) for token in ids]
    return [character[sum(lengths[:place])] for place in range(len(ids))]


async def test_scoring_a_prompt_generates_nothing(service: Service) -> None:
    for prompt in ("The dog.", [5, 6, 7]):
        response = await complete(service, prompt, echo=True, logprobs=0, max_tokens=0)
        [choice] = response.json()["choices"]
        expected = service.control.inference.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
        assert choice["text"] == expected
        assert len(choice["logprobs"]["tokens"]) == len(service.script.requests[-1].token_ids)
        assert (choice["finish_reason"], response.json()["usage"]["completion_tokens"]) == ("length", 0)


async def test_stream(service: Service) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    response = await complete(service, ["Say", "Tell"], **fields, echo=True)
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    texts: dict[int, str] = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        assert "usage" not in chunk
        texts[choice["index"]] += choice["text"]
    assert texts[0].startswith("Say")
    assert texts[1].startswith("Tell")
    assert SPEECH.startswith(texts[0].removeprefix("Say"))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons.count("length") == 2


async def test_offsets_of_streamed_logprobs(service: Service) -> None:
    response = await complete(service, stream=True, logprobs=1, max_tokens=4)
    chunks = [
        json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line.startswith("data: {")
    ]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    tokens = [token for part in parts for token in part["tokens"]]
    assert "".join(tokens) == text
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt"),
    ([], {}, "prompt"),
    ([[]], {}, "prompt"),
    (["a", 1], {}, "prompt"),
    ([1.5], {}, "prompt"),
    ([True], {}, "prompt"),
    ([-1], {}, "prompt"),
    ([100_000], {}, "prompt"),
    (["a"] * 257, {}, "prompt"),
    ({"a": 1}, {}, "prompt"),
    (["a"] * 256, {"n": 3}, "n"),
    ("a", {"max_tokens": 0}, "max_tokens"),
    ("a", {"logprobs": 21}, "logprobs"),
    ("a", {"logprobs": True, "typo": 1}, "typo"),
    ("a", {"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ("a", {"suffix": "b"}, "suffix"),
    ("a", {"best_of": 2}, "best_of"),
    ("a", {"model": None}, "model"),
    ("a", {"tools": []}, "tools"),
    ("word " * 2000, {}, "prompt"),
]


async def test_refused_fields_are_named(service: Service) -> None:
    told = []
    for prompt, fields, _ in REFUSED:
        response = await complete(service, prompt, **fields)
        told.append((response.status_code, response.json()["error"]["param"]))
    assert told == [(400, param) for _, _, param in REFUSED]
    assert service.script.requests == []


async def test_fields_that_change_nothing_are_taken(service: Service) -> None:
    needed = {"model", "prompt", "max_tokens"}
    nulls = dict.fromkeys(name for name in CompletionRequest.model_fields if name not in needed)
    labels = {"store": False, "metadata": {"a": "b"}, "prompt_cache_key": "x", "safety_identifier": "y", "best_of": 1}
    for fields in (nulls, labels, {"n": 2, "best_of": 2, "suffix": ""}):
        assert (await complete(service, **fields)).status_code == 200


async def test_one_failure_ends_all_prompts(service: Service) -> None:
    service.script.fail_after = 1
    response = await complete(service, ["Say", "Tell", "Ask"], max_tokens=4)
    assert response.status_code == 503
