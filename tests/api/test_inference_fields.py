"""Every field of a request for text changes what is asked of the engine or what is answered, is refused by name, or is
on the list of those that change nothing: none is passed over that is not named here.

`tests/engine/test_sampler.py` goes on from the engine's request to the token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from tenora.api.schemas.chat import ChatCompletionRequest, Message
from tenora.api.schemas.completions import CompletionRequest
from tests.api.conftest import Service
from tests.support.schemas import leaves

Fields = Mapping[str, Any]

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
CHAT: Fields = {"messages": TURNS, "max_tokens": 6}
COMPLETION: Fields = {"prompt": "Hi", "max_tokens": 6}


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [TURNS[0], {**TURNS[1], **fields}]}


OF_BOTH: Mapping[str, Fields] = {
    "max_tokens": {"max_tokens": 3},
    "n": {"n": 2},
    "stop": {"stop": ["quick"]},
    "stream": {"stream": True},
    "stream_options.include_usage": {"stream": True, "stream_options": {"include_usage": True}},
    "seed": {"seed": 5},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "frequency_penalty": {"frequency_penalty": 1},
    "presence_penalty": {"presence_penalty": 1},
    "logit_bias": {"logit_bias": {"5": 1}},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 2},
    "min_tokens": {"min_tokens": 1},
    "ignore_eos": {"ignore_eos": True},
    "stop_token_ids": {"stop_token_ids": [9]},
    "include_stop_str_in_output": {"stop": "quick", "include_stop_str_in_output": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "priority": {"priority": 3},
}
USED: Mapping[type[BaseModel], Mapping[str, Fields]] = {
    ChatCompletionRequest: {
        **OF_BOTH,
        "messages.role": turn(role="assistant"),
        "messages.content.text": turn(content=[{"type": "text", "text": "Ho"}]),
        "max_completion_tokens": {"max_completion_tokens": 2},
        "logprobs": {"logprobs": True},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        "return_tokens_as_token_ids": {"logprobs": True, "return_tokens_as_token_ids": True},
    },
    CompletionRequest: {
        **OF_BOTH,
        "prompt": {"prompt": "Ho"},
        "echo": {"echo": True},
        "logprobs": {"logprobs": 1},
        "return_tokens_as_token_ids": {"logprobs": 1, "return_tokens_as_token_ids": True},
    },
}
BESIDE: Mapping[str, Fields] = {
    "stream_options.include_usage": {"stream": True},
    "include_stop_str_in_output": {"stop": "quick"},
    "top_logprobs": {"logprobs": True},
}
"""What another field needs, by itself; the same for both, but for the number that `logprobs` is in completions."""

LABELS: Mapping[str, Fields] = {
    "user": {"user": "desk"},
    "metadata": {"metadata": {"team": "desk"}},
    "store": {"store": False},
    "service_tier": {"service_tier": "default"},
    "prompt_cache_key": {"prompt_cache_key": "desk"},
    "prompt_cache_retention": {"prompt_cache_retention": "24h"},
    "safety_identifier": {"safety_identifier": "user-1"},
    "stream_options.include_obfuscation": {"stream": True, "stream_options": {"include_obfuscation": True}},
}
NOTHING: Mapping[type[BaseModel], Mapping[str, Fields]] = {
    ChatCompletionRequest: {
        **LABELS,
        "messages.content.type": turn(content=[{"type": "text", "text": "Hi"}]),
        "parallel_tool_calls": {"parallel_tool_calls": True},
        "verbosity": {"verbosity": "high"},
        "modalities": {"modalities": ["text"]},
        "tools": {"tools": []},
        "tool_choice": {"tool_choice": "none"},
        "functions": {"functions": []},
        "function_call": {"function_call": "none"},
        "response_format": {"response_format": {"type": "text"}},
        "chat_template_kwargs": {"chat_template_kwargs": {}},
        "messages.tool_calls": turn(tool_calls=[]),
        "messages.annotations": turn(annotations=[]),
    },
    CompletionRequest: {**LABELS, "suffix": {"suffix": ""}, "best_of": {"best_of": 1}},
}

REFUSED: Mapping[type[BaseModel], Mapping[str, Fields]] = {
    ChatCompletionRequest: {
        "store": {"store": True},
        "service_tier": {"service_tier": "flex"},
        "prompt_cache_options": {"prompt_cache_options": {}},
        "modalities": {"modalities": ["audio"]},
        "tools": {"tools": [{"type": "function"}]},
        "tool_choice": {"tool_choice": "auto"},
        "functions": {"functions": [{"name": "f"}]},
        "function_call": {"function_call": "auto"},
        "response_format": {"response_format": {"type": "json_object"}},
        "chat_template": {"chat_template": "{{ x }}"},
        "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
        "audio": {"audio": {"voice": "x"}},
        "moderation": {"moderation": {}},
        "prediction": {"prediction": {}},
        "reasoning_effort": {"reasoning_effort": "low"},
        "web_search_options": {"web_search_options": {}},
        "messages.content.type": turn(content=[{"type": "image_url"}]),
        "messages.tool_calls": turn(tool_calls=[{"id": "1"}]),
        "messages.function_call": turn(function_call={"name": "f"}),
        "messages.refusal": turn(refusal="no"),
        "messages.audio": turn(audio={"id": "1"}),
        "messages.annotations": turn(annotations=[{}]),
    },
    CompletionRequest: {
        "store": {"store": True},
        "service_tier": {"service_tier": "flex"},
        "prompt_cache_options": {"prompt_cache_options": {}},
        "suffix": {"suffix": "the end"},
        "best_of": {"best_of": 2},
    },
}
COMPOSING = (
    *("adapters.name", "adapters.weight", "combination", "density", "majority_sign_method", "adapter_scale"),
    *("merged_adapters.ids", "merged_adapters.weights", "merged_adapters.merge_strategy"),
    *("merged_adapters.density", "merged_adapters.majority_sign_method"),
)
ELSEWHERE = {
    "model": "tests/control/inference/test_inference.py",
    "adapter_id": "tests/control/inference/test_inference.py",
    **dict.fromkeys(COMPOSING, "tests/api/test_composition.py"),
    "messages.name": "test_a_template_sees_the_names_of_a_conversation",
    "messages.tool_call_id": "test_a_template_sees_the_names_of_a_conversation",
}
BODIES: Mapping[type[BaseModel], tuple[str, Fields]] = {
    ChatCompletionRequest: ("chat/completions", CHAT),
    CompletionRequest: ("completions", COMPLETION),
}
SCHEMAS = tuple(BODIES)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_is_here(schema: type[BaseModel]) -> None:
    known = {*USED[schema], *NOTHING[schema], *REFUSED[schema], *ELSEWHERE}
    fields = set(leaves(schema))
    assert fields - known == set()
    assert known - fields <= {name for name in ELSEWHERE if name.startswith("messages.")}


async def came_of(service: Service, schema: type[BaseModel], fields: Fields) -> tuple[Any, ...]:
    """All that the engine was asked for, and the answer without what no two have in common."""
    path, body = BODIES[schema]
    service.script.requests.clear()
    sent = {"model": service.control.inference.base_id, **body, **fields}
    answer = await service.client("infer").post(f"/v1/{path}", json=sent)
    assert answer.status_code == 200, answer.text
    asked = [
        (one.token_ids, one.sampling, one.adapter, one.share_group, one.cache_salt, one.priority)
        for one in service.script.requests
    ]
    if answer.headers["content-type"].startswith("text/event-stream"):
        return asked, streamed(answer.text)
    return asked, {name: value for name, value in answer.json().items() if name not in {"id", "created"}}


def streamed(text: str) -> tuple[str, list[Any]]:
    """The text of a stream and what it used; how the text is cut into events is the machine's affair."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    pieces = [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices]
    return "".join(pieces), [event["usage"] for event in events if event.get("usage")]


@pytest.fixture
def talkative(service: Service) -> Service:
    """An engine whose tokens include a special one, which only a text that skips none shows."""
    service.script.tokens = [*service.control.inference.tokenizer.encode("The quick"), 1, 9]
    return service


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_each_field_changes_something_or_is_known_not_to(talkative: Service, schema: type[BaseModel]) -> None:
    ignored, used = [], []
    for name, fields in USED[schema].items():
        beside = BESIDE.get(name, {})
        if name == "return_tokens_as_token_ids":
            beside = {"logprobs": fields["logprobs"]}
        if await came_of(talkative, schema, fields) == await came_of(talkative, schema, beside):
            ignored.append(name)
    for name, fields in NOTHING[schema].items():
        beside = {"stream": True} if "stream" in fields else {}
        if await came_of(talkative, schema, fields) != await came_of(talkative, schema, beside):
            used.append(name)
    assert (ignored, used) == ([], [])


def test_a_template_sees_the_names_of_a_conversation() -> None:
    """What a base's template makes of them is its own affair."""
    said = Message(role="tool", content="18 degrees", name="weather", tool_call_id="call-1")
    named = {"role": "tool", "content": "18 degrees", "name": "weather", "tool_call_id": "call-1"}
    assert said.for_template() == named


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_each_value_that_would_mean_more_is_refused_by_name(service: Service, schema: type[BaseModel]) -> None:
    path, body = BODIES[schema]
    told = {}
    for name, fields in REFUSED[schema].items():
        sent = {"model": service.control.inference.base_id, **body, **fields}
        answer = await service.client("infer").post(f"/v1/{path}", json=sent)
        error = answer.json().get("error", {})
        told[name] = (answer.status_code, error.get("param"))
    assert service.script.requests == []
    assert told == {name: (400, placed(name)) for name in REFUSED[schema]}


def placed(name: str) -> str:
    """As an error names it: of the second message, and of the first part of its content."""
    return name.replace("messages.", "messages[1].").replace("content.", "content[0].")
