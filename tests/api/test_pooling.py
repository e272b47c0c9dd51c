"""POST /v1/embeddings, /classify, /pooling and /v1/rewards over a scripted engine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tenora.adapters.heads import Head
from tenora.control.adapters.blobs import Shape
from tenora.control.inference.pooling import AT_ONCE
from tests.api.conftest import Service, import_adapter

INTENT = Head(name="intent", kind="classification", start=0, stop=3, labels=("buy", "sell", "hold"))
TOPICS = Head(name="topics", kind="classification", start=3, stop=5, labels=("law", "art"), multi_label=True)
PRICE = Head(name="price", kind="regression", start=5, stop=6, mean=100.0, std=10.0, pooling="mean", layer=-2)
GOOD = Head(name="good", kind="scalar", start=6, stop=7, mean=1.0, std=2.0)
VECTOR = Head(name="vector", kind="embedding", start=7, stop=9, pooling="mean")
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


async def ask(service: Service, path: str, **body: Any) -> httpx.Response:
    return await service.client("infer").post(path, json={"model": service.control.inference.base_id, **body})


async def good(service: Service, path: str, **body: Any) -> Any:
    response = await ask(service, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


async def bad(service: Service, path: str, **body: Any) -> Any:
    response = await ask(service, path, **body)
    assert response.status_code == 400, response.text
    assert not service.script.pools
    return response.json()["error"]


@pytest.fixture(name="adapter")
async def _adapter(
    service: Service, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """`adapter(*heads)`: the adapter "fox" has these heads."""
    assert (await import_adapter(service.client("admin"), "fox", make_adapter())).status_code == 201

    def have(*heads: Head) -> None:
        async def given(_: str) -> Shape:
            return Shape("lora", 4, 0, heads)

        monkeypatch.setattr(service.control._blobs, "shape", given)

    return have


@pytest.mark.parametrize(
    ("given", "count"), [("Say", 1), (["Say", "Tell"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8, 9]], 3)]
)
async def test_forms_of_inputs(service: Service, given: Any, count: int) -> None:
    answer = await good(service, "/v1/embeddings", input=given)
    assert [item["index"] for item in answer["data"]] == list(range(count))
    assert len(service.script.pools) == count
    assert answer["usage"]["prompt_tokens"] == sum(len(request.token_ids) for request in service.script.pools)


async def test_the_base_embeds_by_the_mean_of_its_last_states_at_unit_length(service: Service) -> None:
    service.script.states = lambda _: [0.0, 3.0, 4.0, 0.0]
    answer = await good(service, "/v1/embeddings", input="Say")
    assert answer["data"][0]["embedding"] == pytest.approx([0, 0.6, 0.8, 0])
    (request,) = service.script.pools
    assert (request.pooling, request.layer, request.head, request.adapter) == ("mean", -1, None, None)
    assert request.share_group == request.cache_salt != ""


async def test_dimensions_cut_a_vector_and_bring_it_to_length_one_again(service: Service) -> None:
    service.script.states = lambda _: [3.0, 4.0, 12.0, 0.0]
    answer = await good(service, "/v1/embeddings", input="Say", dimensions=2, encoding_format="base64")
    assert np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4") == pytest.approx([0.6, 0.8])


async def test_answers_keep_the_order_of_many_inputs(service: Service) -> None:
    count = 3 * AT_ONCE
    texts = [[index % 300, 3 + index % 7] for index in range(count)]
    service.script.states = lambda request: [request.token_ids[0], request.token_ids[1], 0.0, 1.0]
    answer = await good(service, "/pooling", input=texts)
    assert [item["data"][:2] for item in answer["data"]] == [[float(x) for x in text] for text in texts]


async def test_pooling_gives_the_states_of_the_layer_and_tokens_that_are_asked_for(service: Service) -> None:
    service.script.states = lambda _: [0.0, 3.0, 4.0, 0.5]
    answer = await good(service, "/pooling", input="Say", pooling="mean", layer=-3)
    assert answer["data"] == [{"index": 0, "object": "pooling", "data": [0.0, 3.0, 4.0, 0.5]}]
    assert (answer["object"], answer["head"]) == ("list", None)
    await good(service, "/pooling", messages=TALK)
    mean, last = service.script.pools
    assert (mean.pooling, mean.layer) == ("mean", -3)
    assert (last.pooling, last.layer) == ("last", -1)
    text = service.control.inference.tokenizer.decode(last.token_ids, skip_special_tokens=False)
    assert text.endswith("Hello<|im_end|>\n"), "a conversation is read as it is, and no answer is begun"


async def test_classify_gives_probabilities_of_the_heads_labels(service: Service, adapter: Callable[..., None]) -> None:
    adapter(INTENT, TOPICS, VECTOR)
    service.script.states = lambda request: [2.0, 1.0, 0.0] if request.head == (0, 3) else [-800.0, 800.0]
    answer = await good(service, "/classify", model="fox", input=["a", "b"], head="intent")
    powers = np.exp([2.0, 1.0, 0.0])
    assert (answer["labels"], answer["head"], answer["multi_label"]) == (["buy", "sell", "hold"], "intent", False)
    for item in answer["data"]:
        assert (item["label"], item["num_classes"]) == ("buy", 3)
        assert item["probs"] == pytest.approx(powers / powers.sum())
    several = await good(service, "/classify", model="fox", input="a", head="topics")
    assert several["data"][0]["probs"] == [0.0, 1.0]
    raw = await good(service, "/classify", model="fox", input="a", head="topics", use_activation=False)
    assert raw["data"][0]["probs"] == [-800.0, 800.0]
    assert service.script.pools[0].adapter is not None


async def test_a_head_is_read_where_it_says_and_told_in_its_units(
    service: Service, adapter: Callable[..., None]
) -> None:
    adapter(INTENT, TOPICS, PRICE)
    service.script.states = lambda _: [1.5]
    answer = await good(service, "/pooling", model="fox", input="a", head="price")
    assert (answer["head"], answer["data"][0]["data"]) == ("price", [115.0])
    (request,) = service.script.pools
    assert (request.pooling, request.layer, request.head) == ("mean", -2, (5, 6))


async def test_an_embedding_head_embeds(service: Service, adapter: Callable[..., None]) -> None:
    adapter(INTENT, VECTOR)
    service.script.states = lambda _: [3.0, 4.0]
    answer = await good(service, "/v1/embeddings", model="fox", input="a")
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert service.script.pools[0].head == (7, 9)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (TALK, ["Hello<|im_end|>\n"]),
        ([TALK, [{"role": "user", "content": "Bye"}]], ["Hello<|im_end|>\n", "Bye<|im_end|>\n"]),
        ({"prompt": TALK[:1], "completions": ["One", "Two"]}, ["One<|im_end|>\n", "Two<|im_end|>\n"]),
        ({"prompt": "The dog", "completions": [" ran", " sat"]}, ["The dog ran", "The dog sat"]),
    ],
)
async def test_rewards_score_whole_conversations_and_answers_to_a_prompt(
    service: Service, adapter: Callable[..., None], given: Any, read: list[str]
) -> None:
    adapter(PRICE, GOOD)
    service.script.states = lambda _: [5.0]
    answer = await good(service, "/v1/rewards", model="fox", input=given)
    assert answer["data"] == [{"index": i, "score": 5.0, "normalized": 2.0} for i in range(len(read))]
    assert (answer["object"], answer["head"]) == ("list", "good")
    decode = service.control.inference.tokenizer.decode
    texts = sorted(decode(request.token_ids, skip_special_tokens=False) for request in service.script.pools)
    assert all(text.endswith(end) for text, end in zip(texts, sorted(read), strict=True)), texts


HEADLESS: Sequence[tuple[str, Any, Sequence[Head], str]] = (
    ("/classify", {"model": None}, (), "no heads"),
    ("/classify", {}, (), "no heads"),
    ("/v1/rewards", {"input": TALK}, (), "no heads"),
    ("/v1/embeddings", {}, (INTENT,), "'intent' (classification)"),
    ("/classify", {}, (INTENT, TOPICS), "'intent' (classification), 'topics' (classification)"),
    ("/pooling", {}, (INTENT, GOOD), "name one in `head`"),
    ("/classify", {"head": "intents"}, (INTENT,), "'intent' (classification)"),
    ("/classify", {"head": "good"}, (INTENT, GOOD), "'good' (scalar)"),
    ("/v1/embeddings", {"model": None, "head": "vector"}, (), "is the base"),
)


async def test_a_head_that_is_not_there_is_a_400_that_lists_those_that_are(
    service: Service, adapter: Callable[..., None], base_id: str
) -> None:
    for path, body, heads, said in HEADLESS:
        adapter(*heads)
        model = body.get("model", "fox") or base_id
        error = await bad(service, path, **{"input": "a", **body, "model": model})
        assert said in error["message"], (path, body)
        assert (error["code"], error["param"]) == ("head_not_found", "head")


UNREADABLE: Sequence[tuple[str, Any, str]] = (
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": ""}, "input"),
    ("/v1/embeddings", {"input": ["a", ""]}, "input[1]"),
    ("/v1/embeddings", {"input": ["a", 5]}, "input"),
    ("/v1/embeddings", {"input": [5, 9999]}, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
    ("/v1/embeddings", {"input": [[5]] * 3 + [[5] * 600]}, "input[3]"),
    ("/pooling", {"input": "a", "layer": -5}, "layer"),
    ("/pooling", {"input": "a", "head": "x", "layer": -2}, "head"),
    ("/pooling", {"input": "a", "messages": TALK}, "input"),
    ("/pooling", {}, "input"),
    ("/v1/rewards", {"input": "a"}, "input"),
    ("/v1/rewards", {"input": {"prompt": "a", "completions": []}}, "input.completions"),
)


async def test_what_cannot_be_read_is_refused_by_its_place(service: Service) -> None:
    for path, body, param in UNREADABLE:
        error = await bad(service, path, **body)
        assert error["param"] == param, error


async def test_a_client_that_leaves_ends_what_is_read_for_it(service: Service) -> None:
    service.script.hold_after = 0
    task = asyncio.create_task(ask(service, "/v1/embeddings", input=["a"] * 70))
    await service.script.until(lambda: len(service.script.pools) >= AT_ONCE)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await service.script.until(lambda: len(service.script.aborted) >= AT_ONCE)
    assert service.control.engine.open_requests == 0
    assert len(service.script.pools) == AT_ONCE


async def test_what_was_read_is_metered(service: Service) -> None:
    await good(service, "/v1/embeddings", input=[[5, 6], [7]])
    text = (await service.client("admin").get("/metrics")).text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vllm:request_"))
    found = {name.partition("{")[0]: float(value) for name, value in samples.items()}
    assert found["vllm:request_prompt_tokens_sum"] == 3
    assert found["vllm:request_generation_tokens_sum"] == 0
