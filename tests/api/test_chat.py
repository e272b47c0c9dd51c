"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import SPEECH, Service

HELLO = [{"role": "user", "content": "Say it."}]


async def ask(service: Service, **fields: Any) -> httpx.Response:
    body = {"messages": HELLO, "max_tokens": 8, **fields}
    return await service.client("infer").post("/v1/chat/completions", json=body)


async def test_an_answer(service: Service, base_id: str) -> None:
    response = await ask(service, model=base_id)
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", base_id)
    [choice] = answer["choices"]
    assert SPEECH.startswith(choice["message"]["content"])
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert "prompt_logprobs" not in answer


async def test_the_prompt_is_the_rendered_conversation(service: Service) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert (await ask(service, messages=messages)).status_code == 200
    [request] = service.script.requests
    rendered = service.control.inference.tokenizer.decode(request.token_ids, skip_special_tokens=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_every_sampling_field_reaches_the_engine(service: Service) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "logit_bias": {"5": 1.5},
        "seed": 42,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 2,
    }
    response = await ask(service, **fields, logprobs=True, top_logprobs=3, prompt_logprobs=2, priority=-5)
    assert response.status_code == 200, response.text
    [request] = service.script.requests
    expected = {**fields, "logit_bias": {5: 1.5}, "stop_token_ids": (9,), "logprobs": 3, "prompt_logprobs": 2}
    assert {name: getattr(request.sampling, name) for name in expected} == expected
    assert (request.sampling.max_tokens, request.priority) == (8, -5)
    assert len(response.json()["prompt_logprobs"]) == len(request.token_ids)


async def test_null_means_the_default(service: Service) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed", "logit_bias", "tools", "user", "logprobs"))
    assert (await ask(service, **nulls)).status_code == 200
    assert service.script.requests[0].sampling.temperature == 1.0


async def test_max_tokens(service: Service) -> None:
    await ask(service, max_tokens=3, max_completion_tokens=5)
    assert service.script.requests[-1].sampling.max_tokens == 5
    await ask(service, max_tokens=None)
    request = service.script.requests[-1]
    assert request.sampling.max_tokens == 512 - len(request.token_ids)
    response = await ask(service, max_tokens=600)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    response = await ask(service, messages=[{"role": "user", "content": "word " * 2000}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


async def test_several_choices_and_stop_strings(service: Service) -> None:
    response = await ask(service, n=3, stop="brown", max_tokens=50)
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert choice["message"]["content"] == "The quick "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "brown")
    kept = await ask(service, stop=["brown"], include_stop_str_in_output=True, max_tokens=50)
    assert kept.json()["choices"][0]["message"]["content"] == "The quick brown"
    assert answer["usage"]["prompt_tokens"] == kept.json()["usage"]["prompt_tokens"]  # once, however many choices


async def test_logprobs(service: Service) -> None:
    response = await ask(service, logprobs=True, top_logprobs=2, max_tokens=2)
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    assert set(content[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert content[0]["token"] == "The"
    assert content[0]["bytes"] == list(b"The")
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -1.5]
    chosen_only = await ask(service, logprobs=True, max_tokens=1)
    assert chosen_only.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    without = await ask(service, max_tokens=1)
    assert without.json()["choices"][0]["logprobs"] is None


async def test_prompt_logprobs_in_the_form_of_vllm(service: Service) -> None:
    response = await ask(service, prompt_logprobs=1, max_tokens=1)
    first, second, *_ = response.json()["prompt_logprobs"]
    assert first is None
    token_id = str(service.script.requests[0].token_ids[1])
    assert second[token_id]["rank"] == 1
    assert second[token_id]["logprob"] == -0.5


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "unsupported_parameter"),
    ({"functions": []}, "functions", "unknown_parameter"),
    ({"typo": 1}, "typo", "unknown_parameter"),
    ({"n": 17}, "n", None),
    ({"n": 0}, "n", None),
    ({"temperature": 2.1}, "temperature", None),
    ({"temperature": "hot"}, "temperature", None),
    ({"top_p": 0}, "top_p", None),
    ({"top_k": -2}, "top_k", None),
    ({"min_p": 1.5}, "min_p", None),
    ({"frequency_penalty": 3}, "frequency_penalty", None),
    ({"repetition_penalty": 0}, "repetition_penalty", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"min_tokens": 9}, "min_tokens", None),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", None),
    ({"stop": [""]}, "stop[0]", None),
    ({"stop": 5}, "stop", None),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", None),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", None),
    ({"logit_bias": {"100000": 1}}, "logit_bias", None),
    ({"stop_token_ids": [100000]}, "stop_token_ids", None),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": True, "stream_options": {"typo": True}}, "stream_options.typo", "unknown_parameter"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", None),
    ({"seed": 2**63}, "seed", None),
    ({"messages": "hi"}, "messages", None),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [{"role": "user"}]}, "messages[0]", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", None),
    ({"messages": [{"role": "user", "content": "x", "extra": 1}]}, "messages[0].extra", "unknown_parameter"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", None),
]


async def test_refused_fields_are_named(service: Service) -> None:
    told = []
    for fields, _, _ in REFUSED:
        response = await ask(service, **fields)
        error = response.json()["error"]
        told.append((response.status_code, error["param"], error["code"]))
    assert told == [(400, param, code or "invalid_value") for _, param, code in REFUSED]
    assert service.script.requests == []


async def test_not_a_number_is_not_json(service: Service) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
    headers = {"content-type": "application/json"}
    response = await service.client("infer").post("/v1/chat/completions", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


async def test_depth_is_bounded(service: Service) -> None:
    body = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    headers = {"content-type": "application/json"}
    response = await service.client("infer").post("/v1/chat/completions", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("fields", [{"model": "nobody"}, {"adapter_id": "nobody"}, {"model": "ft:x:y:z:1"}])
async def test_unknown_models(service: Service, fields: dict[str, Any]) -> None:
    response = await ask(service, **fields)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_errors_of_the_engine_keep_their_status(service: Service) -> None:
    service.script.fail_after = 0
    service.script.fail_code = "adapter_unavailable"
    for stream in (False, True):
        response = await ask(service, stream=stream)
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/json"
        assert json.loads(response.content)["error"]["code"] == "adapter_unavailable"
        assert int(response.headers["retry-after"]) >= 1
