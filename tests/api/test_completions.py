"""POST /v1/completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import SPEECH, Service


async def complete(service: Service, prompt: Any = "Say", **fields: Any) -> httpx.Response:
    return await service.client("infer").post("/v1/completions", json={"prompt": prompt, **fields})


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
    assert [
        choice["text"][offset:].startswith(token)
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    ]
    assert "prompt_logprobs" not in choice


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
    ("word " * 2000, {}, "prompt"),
]


async def test_refused_fields_are_named(service: Service) -> None:
    told = []
    for prompt, fields, _ in REFUSED:
        response = await complete(service, prompt, **fields)
        told.append((response.status_code, response.json()["error"]["param"]))
    assert told == [(400, param) for _, _, param in REFUSED]
    assert service.script.requests == []


async def test_one_failure_ends_all_prompts(service: Service) -> None:
    service.script.fail_after = 1
    response = await complete(service, ["Say", "Tell", "Ask"], max_tokens=4)
    assert response.status_code == 503
