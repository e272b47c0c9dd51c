"""The whole engine on tiny models, stepped by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine.core import Engine
from tenora.engine.messages import (
    Abort,
    ForgetPrefixes,
)
from tenora.engine.sequence import SequenceState
from tenora.errors import ConfigurationError
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tests.engine.driver import MakeDriver, greedy, load_peft
from tests.engine.requests import generate, prompt, sampling
from tests.support.errors import OUT_OF_MEMORY
from tests.support.tiny import build_tiny


def generated(model: transformers.PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """transformers' own greedy generation with its cache, in which a scaled RoPE keeps the keys that it has rotated."""
    mask = torch.ones(1, len(ids))
    out = model.generate(
        torch.tensor([ids]), attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=-1
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize("family", ["smollm2", "llama", "mistral", "qwen2", "qwen3", "dynamic_rope", "llama3_rope"])
def test_greedy_tokens_equal_those_of_transformers(
    family: str, make_tiny: Callable[[str], Path], driver: MakeDriver
) -> None:
    directory = make_tiny(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tiny = driver(load_decoder(directory), max_num_batched_tokens=24)
    limit = tiny.engine.max_model_len
    prompts = [prompt(length, seed) for seed, length in enumerate((1, 2, 7, 33, min(70, limit - 14)))]
    answers = tiny.run(*(generate(ids, sampling(max_tokens=12)) for ids in prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer.finish_reason == "length"
        assert answer.tokens == generated(model, ids, 12)


def test_a_length_dependent_rope_equals_the_cached_generation_of_transformers(
    tmp_path: Path, driver: MakeDriver
) -> None:
    """longrope: a prompt beyond 64 tokens is rotated by other factors from its first token on, also in chunks."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 8.0}
    directory = build_tiny(tmp_path, "llama", rope_parameters={**rope, **factors})
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tiny = driver(load_decoder(directory), max_num_batched_tokens=24)
    prompts = [prompt(length, length) for length in (40, 60, 80, 81)]
    answers = tiny.run(*(generate(ids, sampling(max_tokens=12)) for ids in prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == generated(model, ids, 12)
    # 80 tokens share nothing with the 60 of another class, though those are their prefix.
    (short,) = tiny.run(generate(prompts[2][:60], sampling(max_tokens=2)))
    assert short.cached == 0


def test_sixteen_sequences_with_eight_adapters_equal_each_alone(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    kinds = [None, *adapters]
    requests = [
        generate(prompt(5 + 3 * index, index), sampling(max_tokens=24, logprobs=0), adapter=kinds[index % 9])
        for index in range(16)
    ]
    together = driver(max_num_batched_tokens=48).run(*requests)
    alone = driver()
    for request, answer in zip(requests, together, strict=True):
        (one,) = alone.run(request)
        assert answer.tokens == one.tokens
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(
            [entry.logprob for entry in one.logprobs], abs=1e-4
        )
    base = driver().tokens(requests[1].token_ids, sampling(max_tokens=24))
    assert base != together[1].tokens, "the adapter changes nothing, so the test above shows nothing"


def test_each_adapter_gives_what_peft_gives(driver: MakeDriver, adapters: list[AdapterRef], tiny_base: Path) -> None:
    ids = prompt(9, 3)
    requests = [generate(ids, sampling(max_tokens=10, logprobs=0), adapter=adapter) for adapter in adapters]
    for adapter, answer in zip(adapters, driver().run(*requests), strict=True):
        tokens, logprobs = greedy(load_peft(tiny_base, adapter), ids, 10)
        assert answer.tokens == tokens
        want = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(want, abs=1e-4)


def test_seeded_tokens_do_not_depend_on_the_batch_or_on_preemption(
    driver: MakeDriver, adapters: list[AdapterRef]
) -> None:
    params = sampling(max_tokens=30, temperature=1.2, top_p=0.95, seed=11, presence_penalty=0.3)
    ids = prompt(12)
    alone = driver().tokens(ids, params, adapters[1])
    others = [generate(prompt(20, seed), sampling(max_tokens=40, temperature=1.0)) for seed in range(1, 6)]
    crowded = driver(kv_blocks=24, max_num_batched_tokens=32)
    answer, *_ = crowded.run(generate(ids, params, adapter=adapters[1], priority=5), *others)
    assert crowded.engine.stats().preemptions > 0
    assert answer.tokens == alone
    assert driver().tokens(ids, sampling(max_tokens=30, temperature=1.2, seed=12), adapters[1]) != alone


def test_tiny_kv_memory_preempts_and_gives_the_same_tokens(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    requests = [
        generate(
            prompt(20, seed), sampling(max_tokens=24), adapter=[None, *adapters][seed % 4], share_group=str(seed % 3)
        )
        for seed in range(8)
    ]
    small = driver(kv_blocks=20)
    answers = small.run(*requests)
    assert small.engine.stats().preemptions > 0
    large = driver()
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == large.run(request)[0].tokens
    assert large.engine.stats().preemptions == 0


def test_prefix_cache_hits_give_the_same_tokens(driver: MakeDriver) -> None:
    tiny = driver()
    ids = prompt(30)
    first, second = (tiny.run(generate(ids, sampling(max_tokens=9)))[0] for _ in range(2))
    assert (first.cached, second.cached) == (0, 28)
    assert second.tokens == first.tokens
    longer = [*ids, *first.tokens, 5, 6]  # the next turn of a conversation: generated blocks are found as well
    (third,) = tiny.run(generate(longer, sampling(max_tokens=9)))
    assert third.cached == 36  # 30 + 9 tokens, of which the last was never computed
    assert third.tokens == driver().tokens(longer, sampling(max_tokens=9))
    assert tiny.engine.stats().prefix_hits == 28 + 36
    # A prompt that is known to its very end is not skipped altogether.
    (whole,) = tiny.run(generate(ids[:28], sampling(max_tokens=9)))
    assert whole.cached == 24


def test_prefixes_are_shared_within_a_salt_and_an_adapter_version_only(
    driver: MakeDriver, adapters: list[AdapterRef]
) -> None:
    tiny = driver()
    ids = prompt(30)

    def cached(salt: str, adapter: AdapterRef | None) -> int:
        (answer,) = tiny.run(generate(ids, sampling(max_tokens=2), cache_salt=salt, adapter=adapter))
        return answer.cached

    for salt, adapter in (("a", None), ("b", None), ("a", adapters[0]), ("a", adapters[1]), ("b", adapters[0])):
        assert cached(salt, adapter) == 0
        assert cached(salt, adapter) == 28


def test_prefixes_of_a_tenant_that_is_gone_are_not_found_again(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    """Neither the base's nor an adapter's, nor what its last sequence leaves; others keep theirs."""
    tiny, ids = driver(), prompt(30)

    def cached(salt: str, adapter: AdapterRef | None) -> int:
        (answer,) = tiny.run(generate(ids, sampling(max_tokens=2), cache_salt=salt, adapter=adapter))
        return answer.cached

    for salt in ("gone", "stays"):
        for adapter in (None, adapters[0]):
            assert cached(salt, adapter) == 0
    last = tiny.add(generate(ids, sampling(max_tokens=20), cache_salt="gone"))
    while not last.outputs:
        tiny.step()
    tiny.engine.add(ForgetPrefixes("gone"))
    while not last.done:
        tiny.step()
    assert last.failure is None
    assert [cached("gone", adapter) for adapter in (None, adapters[0])] == [0, 0]
    assert [cached("stays", adapter) for adapter in (None, adapters[0])] == [28, 28]


def test_prefixes_of_another_length_class_are_not_shared() -> None:
    """With a RoPE scaling that depends on the length, the same tokens have other keys in a longer prompt."""
    short, long = (SequenceState.start(generate(prompt(8)), 0, length_class) for length_class in (0, 1))
    assert not set(short.hashes(4, 8)) & set(long.hashes(4, 8))


def test_prompt_logprobs_equal_transformers_in_chunks_and_after_a_cached_run(
    driver: MakeDriver, tiny_base: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = prompt(50)
    with torch.no_grad():
        want = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
    tiny = driver(max_num_batched_tokens=16)
    for _ in range(2):
        (answer,) = tiny.run(generate(ids, sampling(max_tokens=2, prompt_logprobs=3)))
        entries = answer.outputs[0].prompt_logprobs
        assert entries is not None
        assert entries[0] is None
        assert len(entries) == 50
        assert answer.outputs[1].prompt_logprobs is None
        for position, entry in enumerate(entries[1:]):
            assert entry is not None
            assert entry.token_id == ids[position + 1]
            assert entry.logprob == pytest.approx(float(want[position, ids[position + 1]]), abs=1e-4)
            assert [token for token, _ in entry.top] == want[position].topk(3).indices.tolist()


def test_scores_from_a_token_on_are_those_of_the_whole_prompt_though_its_beginning_is_cached(
    driver: MakeDriver,
) -> None:
    ids, other = prompt(50), [*prompt(30), *prompt(20, 7)]
    (want,) = driver().run(generate(other, sampling(max_tokens=0, prompt_logprobs=0)))
    tiny = driver(max_num_batched_tokens=16)
    tiny.run(generate(ids, sampling(max_tokens=1)))
    (answer,) = tiny.run(generate(other, sampling(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=30)))
    found, whole = (one.outputs[0].prompt_logprobs or [] for one in (answer, want))
    assert answer.outputs[0].cached_tokens == 28
    assert found[:30] == [None] * 30
    assert [(entry.token_id, entry.logprob) for entry in found[30:] if entry] == [
        (entry.token_id, pytest.approx(entry.logprob, abs=1e-5)) for entry in whole[30:] if entry
    ]
    assert len(found) == 50


def test_a_prompt_can_be_scored_without_generating(driver: MakeDriver) -> None:
    (answer,) = driver().run(generate(prompt(5), sampling(max_tokens=0, prompt_logprobs=0)))
    assert answer.tokens == []
    assert answer.finish_reason == "length"
    assert len(answer.outputs[0].prompt_logprobs or ()) == 5


def test_sequences_end_as_they_were_told(driver: MakeDriver) -> None:
    tiny = driver()
    ids = prompt(6, 4)
    free = tiny.tokens(ids, sampling(max_tokens=12))
    stop = free[5]
    cut = free.index(stop)

    def run(**given: Any) -> Any:
        return tiny.run(generate(ids, sampling(max_tokens=12, **given)))[0]

    answer = run(stop_token_ids=(stop,))
    assert answer.tokens == free[:cut]
    assert answer.finish_reason == "stop"
    assert answer.outputs[-1].stop_token_id == stop
    answer = run(stop_token_ids=(stop,), logprobs=0)
    assert len(answer.logprobs) == cut  # the stop token itself is not reported
    answer = run(stop_token_ids=(stop,), min_tokens=cut + 3)
    assert len(answer.tokens) >= cut + 3
    assert stop not in answer.tokens[: cut + 3]
    # The engine has no end tokens of its own: what ends a text is known where text becomes tokens.
    answer = run(logit_bias={2: 1000.0}, stop_token_ids=(2,))
    assert (answer.tokens, answer.finish_reason, answer.outputs[-1].stop_token_id) == ([], "stop", 2)
    assert run(logit_bias={2: 1000.0}).tokens == [2] * 12


def test_a_sequence_ends_at_the_models_limit(driver: MakeDriver) -> None:
    tiny = driver(max_model_len=20)
    assert tiny.engine.ready.max_model_len == 20
    (answer,) = tiny.run(generate(prompt(15), sampling(max_tokens=100)))
    assert len(answer.tokens) == 5
    assert answer.finish_reason == "length"


def test_the_kv_memory_limits_the_context(driver: MakeDriver, decoder: Decoder) -> None:
    tiny = driver(kv_blocks=14)
    assert tiny.engine.max_model_len == 56
    (answer,) = tiny.run(generate(prompt(53), sampling(max_tokens=9)))
    assert len(answer.tokens) == 3
    with pytest.raises(ConfigurationError, match="TENORA_KV_CACHE_BYTES"):
        Engine(decoder, Settings(kv_cache_bytes=2**20, block_size=2**16))


@pytest.mark.parametrize(
    ("ids", "given", "code"),
    [
        ([], {}, "invalid_request"),
        ([384], {}, "invalid_request"),
        ([-1], {}, "invalid_request"),
        ([1], {"logit_bias": {384: 1.0}}, "invalid_request"),
        ([1], {"stop_token_ids": (999,)}, "invalid_request"),
        ([1], {"temperature": float("nan")}, "invalid_request"),
        ([1], {"top_p": 0.0}, "invalid_request"),
        ([1], {"repetition_penalty": 0.0}, "invalid_request"),
        ([1] * 600, {}, "context_length_exceeded"),
    ],
)
def test_a_bad_request_fails_alone(driver: MakeDriver, ids: list[int], given: dict[str, Any], code: str) -> None:
    tiny = driver()
    bad, good = tiny.run(generate(ids, sampling(**given)), generate([5, 6]))
    assert bad.failure is not None
    assert bad.failure.code == code
    assert len(good.tokens) == 8


def test_abort_gives_everything_back_at_any_time(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    for steps in range(6):
        tiny = driver(max_num_batched_tokens=16, max_num_seqs=2)
        requests = [
            generate(prompt(30, seed), sampling(max_tokens=50), adapter=adapters[seed % 3]) for seed in range(4)
        ]
        for request in requests:
            tiny.add(request)
        for _ in range(steps):
            tiny.step()
        for request in requests:
            tiny.engine.add(Abort(request.request_id))
            tiny.engine.add(Abort(request.request_id))
        before = {request.request_id: len(tiny.answers[request.request_id].tokens) for request in requests}
        tiny.step()
        tiny.check_baseline()
        assert before == {request.request_id: len(tiny.answers[request.request_id].tokens) for request in requests}


def test_a_failed_forward_fails_its_batch_and_the_engine_goes_on(
    driver: MakeDriver, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = driver(max_num_seqs=3)
    expected = driver().tokens(prompt(8), sampling(max_tokens=5), adapters[0])
    requests = [generate(prompt(8, seed), sampling(max_tokens=5), adapter=adapters[0]) for seed in range(5)]
    answers = [tiny.add(request) for request in requests]
    tiny.step()
    tiny.step()
    run = tiny.engine.runner.run

    def broken(batch: Any) -> Any:
        run(batch)
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(tiny.engine.runner, "run", broken)
    while not all(answer.done for answer in answers[:3]):
        tiny.step()
    monkeypatch.undo()
    assert [answer.failure and answer.failure.code for answer in answers[:3]] == ["engine_error"] * 3
    tiny.run()
    while not all(answer.done for answer in answers):
        tiny.step()
    tiny.check_baseline()
    assert all(answer.failure is None for answer in answers[3:])
    assert tiny.tokens(prompt(8), sampling(max_tokens=5), adapters[0]) == expected


def test_out_of_memory_is_named(driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = driver()
    for error in OUT_OF_MEMORY:
        monkeypatch.setattr(tiny.engine.runner, "run", _raiser(error))
        (answer,) = tiny.run(generate([5]))
        assert answer.failure is not None
        assert answer.failure.code == "out_of_memory"


def _raiser(error: Exception) -> Callable[[Any], Any]:
    def run(batch: Any) -> Any:
        raise error

    return run


def test_a_row_without_finite_logits_fails_alone(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    tiny = driver()
    poisoned, clean = generate(prompt(6), sampling(max_tokens=6), adapter=adapters[0]), generate(prompt(6, 1))
    expected = tiny.tokens(clean.token_ids, sampling())
    tiny.add(poisoned)
    other = tiny.add(clean)
    tiny.step()
    while not tiny.answers[poisoned.request_id].outputs:
        tiny.step()
    (slot,) = {s.slot for s in tiny.engine.scheduler.running if s.slot >= 0}
    tiny.engine.pool.tables.scaling[:, slot] = torch.inf
    while not other.done or not tiny.answers[poisoned.request_id].done:
        tiny.step()
    failure = tiny.answers[poisoned.request_id].failure
    assert failure is not None
    assert failure.code == "adapter_overflow"
    assert other.tokens == expected
    tiny.check_baseline()
