"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tenora.api.schemas.chat import ChatCompletionRequest
from tests.api.conftest import SPEECH, Service

HELLO = [{"role": "user", "content": "Say it."}]


async def ask(service: Service, **fields: Any) -> httpx.Response:
    body = {"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 8, **fields}
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
        "min_tokens": 2,
    }
    given = {"logprobs": True, "top_logprobs": 3, "prompt_logprobs": 2, "priority": -5, "ignore_eos": True}
    response = await ask(service, **fields, **given)
    assert response.status_code == 200, response.text
    [request] = service.script.requests
    expected = {**fields, "logit_bias": {5: 1.5}, "stop_token_ids": (9,), "logprobs": 3, "prompt_logprobs": 2}
    assert {name: getattr(request.sampling, name) for name in expected} == expected
    assert (request.sampling.max_tokens, request.priority) == (8, -5)
    assert len(response.json()["prompt_logprobs"]) == len(request.token_ids)


async def test_null_means_the_default(service: Service) -> None:
    needed = {"model", "messages", "max_tokens"}
    nulls = dict.fromkeys(name for name in ChatCompletionRequest.model_fields if name not in needed)
    answer = await ask(service, **nulls)
    assert answer.status_code == 200, answer.text
    assert service.script.requests[0].sampling.temperature == 1.0
    deep = await ask(service, stream=True, stream_options={"include_usage": None, "include_obfuscation": None})
    assert deep.status_code == 200
    messages = [{"role": "user", "content": "Hi", "name": None, "tool_calls": None, "annotations": None}]
    assert (await ask(service, messages=messages)).status_code == 200


async def test_no_model_is_never_the_base_in_silence(service: Service) -> None:
    """`model=job.fine_tuned_model` of a job that has not ended is null."""
    client = service.client("infer")
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "Hi"})):
        for unnamed in ({}, {"model": None}, {"model": None, "adapter_id": None}):
            error = (await client.post(f"/v1/{path}", json={**body, **unnamed})).json()["error"]
            assert (error["param"], error["code"]) == ("model", "missing_required_parameter")
            assert "fine_tuned_model" in error["message"]
    assert service.script.requests == []


@pytest.mark.parametrize(
    "field",
    [
        {"store": False},
        {"metadata": {"team": "desk"}},
        {"parallel_tool_calls": True},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"prompt_cache_key": "desk"},
        {"safety_identifier": "user-1"},
        {"verbosity": "low"},
        {"functions": [], "function_call": "none"},
    ],
)
async def test_fields_that_change_nothing_are_taken(service: Service, field: dict[str, Any]) -> None:
    answers = [await ask(service, **given) for given in ({}, field)]
    assert [answer.status_code for answer in answers] == [200, 200]
    plain, labelled = service.script.requests
    assert (plain.token_ids, plain.sampling) == (labelled.token_ids, labelled.sampling)


async def test_a_top_p_of_zero_is_greedy(service: Service) -> None:
    await ask(service, top_p=0, temperature=1.5)
    [request] = service.script.requests
    assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 1.0)


async def test_the_models_ends_and_the_stops_asked_for_reach_the_engine(service: Service) -> None:
    """The engine stops at exactly these: <|im_end|> (2) is the base's end and <|endoftext|> (0) a special token."""
    for fields, expected in (
        ({}, (2,)),
        ({"stop_token_ids": [9]}, (2, 9)),
        ({"stop": ["<|endoftext|>", "fox"]}, (0, 2)),
        ({"ignore_eos": True}, ()),
        ({"ignore_eos": True, "stop": "<|im_end|>"}, (2,)),
        ({"stop": "<|im_end|>."}, (2,)),  # more than a token: a string to look for
    ):
        assert (await ask(service, **fields)).status_code == 200
        assert service.script.requests[-1].sampling.stop_token_ids == expected


async def test_special_tokens_show_when_they_are_not_skipped(service: Service) -> None:
    tokenizer = service.control.inference.tokenizer
    service.script.tokens = [*tokenizer.encode("fox"), 1, *tokenizer.encode("dog")]
    said = {}
    for skip in (None, True, False):
        answer = await ask(service, skip_special_tokens=skip, max_tokens=len(service.script.tokens))
        said[skip] = answer.json()["choices"][0]["message"]["content"]
    assert said == {None: "foxdog", True: "foxdog", False: "fox<|im_start|>dog"}


async def test_tokens_of_logprobs_as_ids(service: Service) -> None:
    answer = await ask(service, logprobs=True, top_logprobs=2, max_tokens=1, return_tokens_as_token_ids=True)
    [place] = answer.json()["choices"][0]["logprobs"]["content"]
    assert place["token"] == f"token_id:{service.script.tokens[0]}"
    assert [other["token"] for other in place["top_logprobs"]] == [place["token"], "token_id:7"]


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
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"service_tier": "priority"}, "service_tier", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", "unsupported_parameter"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": None, "adapter_id": None}, "model", "missing_required_parameter"),
    ({"typo": None}, "typo", "unknown_parameter"),
    ({"typo": 1}, "typo", "unknown_parameter"),
    ({"n": 17}, "n", None),
    ({"n": 0}, "n", None),
    ({"temperature": 2.1}, "temperature", None),
    ({"temperature": "hot"}, "temperature", None),
    ({"top_p": -0.1}, "top_p", None),
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
    (
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "annotations": [{}]}]},
        "messages[0].annotations",
        "unsupported_parameter",
    ),
]


async def test_refused_fields_are_named(service: Service) -> None:
    told = []
    for fields, _, _ in REFUSED:
        response = await ask(service, **fields)
        error = response.json()["error"]
        told.append((response.status_code, error["param"], error["code"]))
    assert told == [(400, param, code or "invalid_value") for _, param, code in REFUSED]
    assert service.script.requests == []


async def test_what_is_refused_of_a_history_says_what_to_do(service: Service) -> None:
    """What other services answered comes back in a conversation."""
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    error = (await ask(service, messages=[{"role": "user", "content": "Hi"}, turn])).json()["error"]
    assert error["message"] == (
        "messages[1].tool_calls: tools are not supported yet, so say in content what was called and what it gave."
    )


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
