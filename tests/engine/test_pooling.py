"""Sequences that end with their prompt and answer with hidden states: against transformers, and beside others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from tenora.adapters.peft_format import AdapterReader
from tenora.adapters.prepared import PreparedAdapter, prepare
from tenora.adapters.ref import AdapterRef
from tenora.adapters.table_rows import RowKind
from tenora.adapters.weights import AdapterPart
from tenora.engine.messages import Abort, Pool
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora_kernels.cpu.runtime.team import Team
from tests.engine.driver import Driver, load_peft
from tests.engine.requests import generate, pool, prompt, sampling

LAYERS = (-1, -2, -3, -4)
Floats = npt.NDArray[np.float32]
MakeDriver = Callable[..., Driver]


def pooled(driver: Driver, *requests: Pool) -> list[Floats]:
    """The answers to requests that arrive together."""
    answers = driver.run(*requests)
    assert [answer.failure for answer in answers] == [None] * len(answers)
    assert all(answer.finish_reason == "stop" and not answer.tokens for answer in answers)
    return [np.frombuffer(answer.outputs[0].pooled or b"", np.float32) for answer in answers]


def oracle(model: Any, tokens: Sequence[int], layer: int, pooling: str) -> Floats:
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[layer][0]
    return (states[-1] if pooling == "last" else states.mean(0)).numpy()


@pytest.fixture(name="base", scope="module")
def _base(tiny_base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture(name="packed", scope="module")
def _packed(tiny_base: Path) -> Decoder:
    """The base as the compiled step computes it."""
    return load_decoder(tiny_base, team=Team(2))


@pytest.fixture(name="any_driver", params=["modules", "compiled"])
def _any_driver(request: pytest.FixtureRequest, driver: MakeDriver, decoder: Decoder, packed: Decoder) -> MakeDriver:
    base = {"modules": decoder, "compiled": packed}[request.param]
    return lambda **settings: driver(base, **settings)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_states_of_every_layer_are_those_of_transformers(
    any_driver: MakeDriver, base: Any, pooling: str
) -> None:
    """In chunks of 16 tokens, all layers in the same steps."""
    texts = [prompt(length, length) for length in (37, 5, 1, 16)]
    asked = [(text, layer) for text in texts for layer in LAYERS]
    found = pooled(
        any_driver(max_num_batched_tokens=16),
        *(pool(text, pooling=pooling, layer=layer) for text, layer in asked),
    )
    for (text, layer), states in zip(asked, found, strict=True):
        wanted = oracle(base, text, layer, pooling)
        np.testing.assert_allclose(states, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.real
@pytest.mark.full
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_states_of_the_real_base_are_those_of_transformers(real_base: Path, pooling: str) -> None:
    """Of the largest number of each state, which is what the layers' sums are rounded by."""
    model = transformers.AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32)
    driver = Driver(load_decoder(real_base, dtype=torch.float32, team=Team(2)), kv_cache_bytes=32 * 2**20)
    text = torch.randint(3, 40000, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    found = pooled(driver, *(pool(text, pooling=pooling, layer=layer) for layer in LAYERS))
    for layer, states in zip(LAYERS, found, strict=True):
        wanted = oracle(model, text, layer, pooling)
        worst = np.abs(states - wanted).max() / np.abs(wanted).max()
        print(f"{pooling} {layer}: {worst:.1e} of {np.abs(wanted).max():.1f}")
        assert worst < 1e-5
    driver.close()


def test_an_adapter_changes_the_pooled_state_as_peft_has_it(
    driver: MakeDriver, tiny_base: Path, adapters: list[AdapterRef]
) -> None:
    text = prompt(21)
    found = pooled(driver(), *(pool(text, adapter=adapter, pooling="mean") for adapter in adapters[:2]))
    for adapter, states in zip(adapters, found, strict=False):
        wanted = oracle(load_peft(tiny_base, adapter).base_model.model, text, -1, "mean")
        np.testing.assert_allclose(states, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_rows_beside_rows_that_generate_have_the_bits_they_have_alone(
    driver: MakeDriver, packed: Decoder, adapters: list[AdapterRef], pooling: str
) -> None:
    """Eight of each, of eight adapters, in the same steps; alone in one chunk, together in small ones."""
    asked = [pool(prompt(30 + i, i), adapter=adapters[i], pooling=pooling, layer=LAYERS[i % 4]) for i in range(8)]
    talk = [generate(prompt(9 + i, 50 + i), sampling(6, logprobs=1), adapter=adapters[i]) for i in range(8)]
    together = driver(packed, max_num_batched_tokens=24)
    spoken = [together.add(request) for request in talk]
    states = pooled(together, *asked)
    while not all(answer.done for answer in spoken):
        together.step()
    alone = driver(packed)
    for request, state in zip(asked, states, strict=True):
        assert (pooled(alone, again(request))[0] == state).all()
    for request, answer in zip(talk, spoken, strict=True):
        (single,) = alone.run(generate(request.token_ids, request.sampling, adapter=request.adapter))
        assert (single.tokens, single.logprobs) == (answer.tokens, answer.logprobs)


def again(request: Pool, **changes: Any) -> Pool:
    """The same under another id."""
    return msgspec.structs.replace(request, request_id=pool([]).request_id, **changes)


@pytest.fixture(name="headed", scope="module")
def _headed(decoder: Decoder, adapters: list[AdapterRef]) -> list[PreparedAdapter]:
    """The eight adapters, each with 3 + i rows of heads; those of every other one have biases."""
    rows, hidden = table_rows(decoder.spec), decoder.spec.hidden_size
    made = []
    for index, adapter in enumerate(adapters):
        weights = AdapterReader(rows, max_rank=64).read(Path(adapter.path))
        random = np.random.default_rng(index)
        values = {RowKind.HEAD: random.normal(size=(3 + index, hidden)), RowKind.HEAD_BIAS: np.ones((3 + index, 1))}
        if index % 2:
            del values[RowKind.HEAD_BIAS]
        parts = (
            AdapterPart(kind, "", a.astype(np.float32), np.zeros((3 + index, 0), np.float32))
            for kind, a in values.items()
        )
        made.append(prepare(replace(weights, parts=tuple(parts)), rows, dtype=torch.float32, device=decoder.device))
    return made


def offered(driver: Driver, headed: list[PreparedAdapter]) -> Driver:
    for index, adapter in enumerate(headed):
        driver.engine.loader.offer(f"head-{index}", adapter)
    return driver


def head_request(index: int, pooling: Any = "last") -> Pool:
    adapter = AdapterRef(digest=f"head-{index}", path="")
    return pool(
        prompt(20 + 3 * index, index), adapter=adapter, head=(1, 3 + index), pooling=pooling, layer=LAYERS[index % 4]
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_heads_scores_are_the_float64_product_of_its_rows_with_the_pooled_state(
    driver: MakeDriver, packed: Decoder, headed: list[PreparedAdapter], pooling: str
) -> None:
    engine = offered(driver(packed), headed)
    for index in (0, 1, 6):
        asked = head_request(index, pooling)
        (scores,) = pooled(engine, asked)
        (state,) = pooled(engine, again(asked, head=None))
        random = np.random.default_rng(index)
        weight = random.normal(size=(3 + index, len(state))).astype(np.float32).astype(np.float64)
        wanted = weight[1:] @ state.astype(np.float64) + (0 if index % 2 else 1)
        np.testing.assert_allclose(scores, wanted, rtol=1e-6)


def test_rows_with_heads_beside_rows_that_generate_have_the_bits_they_have_alone(
    driver: MakeDriver, packed: Decoder, adapters: list[AdapterRef], headed: list[PreparedAdapter]
) -> None:
    """Eight heads of eight adapters and eight other adapters that generate, in the same steps, in small chunks."""
    together = offered(driver(packed, max_num_batched_tokens=24, max_adapters=16), headed)
    talk = [generate(prompt(9 + i, 50 + i), sampling(6, logprobs=1), adapter=adapters[i]) for i in range(8)]
    asked = [head_request(index, ("last", "mean")[index % 2]) for index in range(8)]
    answers = together.run(*asked, *talk)
    assert [answer.failure for answer in answers] == [None] * 16
    alone = offered(driver(packed), headed)
    for request, answer in zip(asked, answers[:8], strict=True):
        assert pooled(alone, again(request))[0].tobytes() == answer.outputs[0].pooled
    for request, answer in zip(talk, answers[8:], strict=True):
        (single,) = alone.run(generate(request.token_ids, request.sampling, adapter=request.adapter))
        assert (single.tokens, single.logprobs) == (answer.tokens, answer.logprobs)


@pytest.mark.parametrize(("head", "said"), [((0, 4), "no such head"), ((2, 3), None)])
def test_rows_beyond_an_adapters_heads_fail_alone(
    driver: MakeDriver, decoder: Decoder, headed: list[PreparedAdapter], head: tuple[int, int], said: str | None
) -> None:
    (answer,) = offered(driver(decoder), headed).run(again(head_request(0), head=head))
    assert (answer.failure is None) is (said is None)
    assert answer.failure is None or said in answer.failure.message


def test_a_mean_is_of_all_tokens_though_the_prefix_cache_knows_them(driver: MakeDriver, base: Any) -> None:
    """The last token's state takes hits; a mean takes none, because hits have no hidden states."""
    text, engine = prompt(33), driver()
    engine.run(generate(text, sampling(1)))
    (last,) = engine.run(pool(text, pooling="last"))
    (mean,) = engine.run(pool(text, pooling="mean"))
    assert last.cached == 32
    assert mean.cached == 0
    for answer, pooling in ((last, "last"), (mean, "mean")):
        wanted = oracle(base, text, -1, pooling)
        found = np.frombuffer(answer.outputs[0].pooled or b"", np.float32)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_mean_that_is_preempted_between_its_chunks_counts_no_token_twice(driver: MakeDriver, packed: Decoder) -> None:
    text = prompt(60, 3)
    (whole,) = pooled(driver(packed), pool(text, pooling="mean"))
    small = driver(packed, kv_blocks=48, max_num_batched_tokens=16)
    talkers = [small.add(generate(prompt(3, 7 + i), sampling(12), priority=-1)) for i in range(12)]
    request = pool(text, pooling="mean")
    answer, done = small.add(request), [0]
    while not (answer.done and all(talker.done for talker in talkers)):
        small.step()
        if (sequence := small.engine.scheduler.get(request.request_id)) is not None:
            done.append(sequence.num_computed)
    assert done != sorted(done), "the test sees nothing: it was not preempted between its chunks"
    assert answer.failure is None
    assert (np.frombuffer(answer.outputs[0].pooled or b"", np.float32) == whole).all()
    small.check_baseline()


def test_a_pooled_sequence_that_is_aborted_between_its_chunks_leaves_nothing(driver: MakeDriver) -> None:
    engine = driver(max_num_batched_tokens=16)
    request = pool(prompt(100), pooling="mean")
    engine.add(request)
    engine.step()
    assert engine.engine.stats().running == 1
    engine.engine.add(Abort(request.request_id))
    engine.step()
    engine.check_baseline()


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"token_ids": []}, "invalid_request", "empty"),
        ({"token_ids": [5] * 600}, "context_length_exceeded", "512"),
        ({"token_ids": [384]}, "invalid_request", "384"),
        ({"layer": 0}, "invalid_request", "-4 to -1"),
        ({"layer": -5}, "invalid_request", "-4 to -1"),
        ({"head": (2, 2)}, "invalid_request", "no rows"),
        ({"head": (0, 1)}, "invalid_request", "no such head"),
    ],
)
def test_what_cannot_be_pooled_fails_alone(driver: MakeDriver, given: Any, code: str, said: str) -> None:
    good = pool(prompt(4))
    bad, other = driver(kv_cache_bytes=2**22).run(pool(given.pop("token_ids", [5]), **given), good)
    assert bad.failure is not None
    assert bad.failure.code == code
    assert said in bad.failure.message
    assert other.failure is None


def test_a_whole_context_can_be_pooled(driver: MakeDriver) -> None:
    """A prompt that leaves no room for a token can be pooled, though it cannot be continued."""
    (answer,) = driver(kv_cache_bytes=2**22).run(pool(prompt(512)))
    assert answer.failure is None


def test_pooled_prompts_are_counted_and_generate_nothing(driver: MakeDriver) -> None:
    engine = driver()
    engine.run(pool(prompt(12)), pool(prompt(7), pooling="mean"))
    stats = engine.engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (19, 0)
