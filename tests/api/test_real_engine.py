"""The same application over the real engine on a tiny model: what the scripted one cannot show."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tenora.config import Settings
from tenora.engine.client.client import AsyncEngine
from tenora.engine.core import Engine
from tests.api.conftest import Service, import_adapter, running
from tests.support.scripted_engine import Script


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    small = {"kv_cache_bytes": 2**24, "adapter_pool_bytes": 2**24, "max_adapters": 4, "threads": 1}
    return Settings(home=tmp_path / "home", device="cpu", dtype="float32", **small)


@pytest.fixture
def base(tiny_base: Path) -> Path:
    """The base that is served."""
    return tiny_base


@pytest.fixture
async def service(settings: Settings, script: Script, base: Path) -> AsyncIterator[Service]:
    engine = AsyncEngine.in_thread(settings, lambda wake: Engine.load(settings, base, wake=wake))
    async with running(settings, script, base, engine) as service:
        yield service


async def test_base_adapter_stream_and_scores(service: Service, make_adapter: Callable[..., Path]) -> None:
    await import_adapter(service.client("adapters"), "fox", make_adapter(1))
    client = service.client("infer")

    async def ask(path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
        response = await client.post(
            path, json={"model": service.control.inference.base_id, "max_tokens": 8, "temperature": 0, **fields}
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    messages = [{"role": "user", "content": "Define: fox."}]
    base = (await ask(messages=messages))["choices"][0]
    adapter = (await ask(messages=messages, model="fox", logprobs=True, top_logprobs=2))["choices"][0]
    assert base["message"]["content"] != adapter["message"]["content"]
    first = adapter["logprobs"]["content"][0]
    assert first["logprob"] == first["top_logprobs"][0]["logprob"] > first["top_logprobs"][1]["logprob"]

    body = {"messages": messages, "model": "fox", "max_tokens": 8, "temperature": 0, "stream": True}
    streamed = await client.post("/v1/chat/completions", json=body)
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines)
    assert text == adapter["message"]["content"]

    scored = await ask("/v1/completions", prompt="Define: fox.", echo=True, logprobs=1, max_tokens=0)
    logprobs = scored["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])

    samples = (await client.get("/metrics")).text
    assert re.search(r'vllm:cache_config_info\{[^}]*block_size="16"', samples)


async def test_a_prompt_of_exactly_the_contexts_length_is_scored(service: Service) -> None:
    inference = service.control.inference
    longest = inference.max_model_len

    async def score(tokens: int, **fields: Any) -> Any:
        body = {"model": inference.base_id, "prompt": [5] * tokens, "max_tokens": 0, "echo": True, **fields}
        return (await service.client("infer").post("/v1/completions", json=body)).json()

    answer = await score(longest, logprobs=0)
    values = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert (len(values), values[0]) == (longest, None)
    assert all(value < 0 for value in values[1:])
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": longest,
        "completion_tokens": 0,
        "total_tokens": longest,
        "prompt_tokens_details": None,
    }
    shorter = (await score(longest - 1, logprobs=0))["choices"][0]["logprobs"]["token_logprobs"]
    assert shorter == pytest.approx(values[:-1], abs=1e-4)
    assert (await score(longest))["choices"][0]["text"] == inference.tokenizer.decode([5] * longest)
    for tokens, fields in ((longest + 1, {}), (longest, {"max_tokens": 1})):
        error = (await score(tokens, **fields))["error"]
        assert error["code"] == "context_length_exceeded"
    assert service.control.engine.healthy


class TestABaseWhoseConfigurationNamesAnotherEnd:
    """The configurations name <|endoftext|> (0); the tokenizer and its template <|im_end|> (2)."""

    @pytest.fixture
    def base(self, tiny_base: Path, tmp_path: Path) -> Path:
        directory = Path(shutil.copytree(tiny_base, tmp_path / "other-end"))
        for name in ("config.json", "generation_config.json"):
            path = directory / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 0}))
        return directory

    async def test_every_end_ends_a_turn(self, service: Service) -> None:
        """The bias makes the model say the token at every place."""

        async def ask(token: int, **fields: Any) -> tuple[str, str, Any, int]:
            body = {"model": service.control.inference.base_id, "max_tokens": 6, "temperature": 0, **fields}
            body |= {"messages": [{"role": "user", "content": "hi"}], "logit_bias": {str(token): 100}}
            answer = (await service.client("infer").post("/v1/chat/completions", json=body)).json()
            [choice] = answer["choices"]
            said = choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]
            return *said, answer["usage"]["completion_tokens"]

        assert [await ask(token) for token in (0, 2)] == [("", "stop", None, 1)] * 2
        assert await ask(1) == ("", "length", None, 6)  # a special token that ends nothing does not show
        assert await ask(1, skip_special_tokens=False) == ("<|im_start|>" * 6, "length", None, 6)
        # Asked for as a string, which never stands in the text, it is a stop token.
        assert await ask(1, stop="<|im_start|>") == ("", "stop", "<|im_start|>", 1)
        assert await ask(1, stop="<|im_start|>", skip_special_tokens=False) == ("", "stop", "<|im_start|>", 1)
        kept = await ask(1, stop=["x", "<|im_start|>"], include_stop_str_in_output=True)
        assert kept == ("<|im_start|>", "stop", "<|im_start|>", 1)
        assert await ask(2, ignore_eos=True) == ("", "length", None, 6)
