"""Activated LoRA: PEFT's numbers, the base's bits before the invocation, and the base's blocks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tenora.adapters.invocation import NEVER, adapted_from
from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Abort, EvictAdapter
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora_kernels.cpu.runtime.team import Team
from tests.engine.driver import Answer, Driver, MakeDriver, load_peft, make_adapter, ref_of
from tests.engine.requests import generate, prompt, sampling
from tests.support.tiny import build_tiny

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INVOCATION = [301, 302, 303]
CONTEXT = prompt(19, seed=5)
PROMPTS = {
    "at the end": [*CONTEXT, *INVOCATION],
    "with more after it": [*CONTEXT, *INVOCATION, *prompt(9, seed=6)],
    "twice": [*CONTEXT[:5], *INVOCATION, *CONTEXT[5:], *INVOCATION, 9],
    "at the start": [*INVOCATION, *CONTEXT],
    "missing": CONTEXT,
}


@pytest.fixture(scope="module")
def activated(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Adapters with one invocation."""
    root = tmp_path_factory.mktemp("activated")
    return [
        make_adapter(tiny_base, root / f"a{n}", targets=ALL, seed=n, alora_invocation_tokens=INVOCATION)
        for n in range(3)
    ]


@pytest.fixture(scope="module", params=["modules", "compiled"])
def base(request: pytest.FixtureRequest, tiny_base: Path) -> Decoder:
    """The tiny base on both executors of a CPU."""
    return load_decoder(tiny_base, team=Team(1) if request.param == "compiled" else None)


@pytest.fixture
def engine(base: Decoder) -> Iterator[Callable[..., Driver]]:
    made: list[Driver] = []

    def make(**given: Any) -> Driver:
        made.append(Driver(base, **given))
        return made[-1]

    yield make
    for each in made:
        each.close()


def scored(tokens: list[int], adapter: AdapterRef | None = None, max_tokens: int = 6) -> Any:
    return generate(tokens, sampling(max_tokens=max_tokens, logprobs=0, prompt_logprobs=0), adapter=adapter)


def numbers(answer: Answer) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first, then of the answer's."""
    assert answer.failure is None
    entries = [*(answer.outputs[0].prompt_logprobs or ())[1:], *answer.logprobs]
    return [entry.logprob for entry in entries if entry is not None]


def same(base: Decoder, found: list[float], wanted: list[float]) -> None:
    """Equal bits where rows are computed alike in every batch; products of torch depend on the number of rows."""
    if base.stack is not None:
        assert found == wanted
    else:
        assert found == pytest.approx(wanted, abs=1e-4)


def test_logits_are_those_of_peft(engine: MakeDriver, tiny_base: Path, activated: list[AdapterRef]) -> None:
    model = load_peft(tiny_base, activated[0])
    driver = engine()
    for tokens in PROMPTS.values():
        (answer,) = driver.run(scored(tokens, activated[0]))
        ids = torch.tensor([tokens + answer.tokens])
        first = adapted_from(tokens, INVOCATION)
        offset = None if first == NEVER else ids.shape[1] - first
        assert adapted_from(ids[0].tolist(), INVOCATION) == first, "PEFT finds the same without being told"
        with torch.no_grad():
            logits = model(ids).logits[0]
            told = model(ids, alora_offsets=[offset]).logits[0]
        assert torch.equal(logits, told)
        want = torch.log_softmax(logits, dim=-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        assert (torch.tensor(numbers(answer)) - want).abs().max() < 1e-5


def test_tokens_before_the_invocation_have_the_bits_of_the_base(
    base: Decoder, engine: MakeDriver, activated: list[AdapterRef]
) -> None:
    for tokens in PROMPTS.values():
        with_adapter, without = (engine().run(scored(tokens, ref))[0] for ref in (activated[0], None))
        first = min(adapted_from(tokens, INVOCATION), len(tokens))
        before = max(first - 1, 0)  # the position before the invocation scores its first token
        same(base, numbers(with_adapter)[:before], numbers(without)[:before])
        acts = first < len(tokens)
        assert any(abs(a - b) > 0.01 for a, b in zip(numbers(with_adapter), numbers(without), strict=True)) == acts


def test_a_mixed_batch_gives_the_bits_of_each_alone(
    base: Decoder, engine: MakeDriver, activated: list[AdapterRef], adapters: list[AdapterRef]
) -> None:
    cases = [(tokens, ref) for tokens in PROMPTS.values() for ref in (activated[0], activated[1], adapters[1], None)]
    alone = [numbers(engine().run(scored(tokens, ref))[0]) for tokens, ref in cases]
    together = engine(max_num_batched_tokens=48)
    together.engine.loader.read_ahead([activated[0], activated[1], adapters[1]])
    together.wait_for_loads()
    mixed = together.run(*(scored(tokens, ref) for tokens, ref in cases))
    for answer, want in zip(mixed, alone, strict=True):
        same(base, numbers(answer), want)


def test_ten_adapters_compute_one_context_once(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base", max_position_embeddings=2048)
    decoder = load_decoder(base, team=Team(1))
    context = prompt(1500, seed=1)

    def computed(**lora: Any) -> int:
        driver = Driver(decoder, block_size=16, max_adapters=10, kv_cache_bytes=2**25)
        made = Path(make_adapter(base, tmp_path / f"made-{len(lora)}", **lora).path)
        for number in range(10):
            other = shutil.copytree(made, tmp_path / f"{len(lora)}-{number}")
            config = json.loads((other / "adapter_config.json").read_text())
            (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": number + 1}))
            driver.run(generate([*context, *INVOCATION], sampling(max_tokens=1), adapter=ref_of(other)))
        driver.close()
        return driver.engine.scheduler.prefix_queries - driver.engine.scheduler.prefix_hits

    assert computed(alora_invocation_tokens=INVOCATION) <= 1.1 * len(context)
    assert computed() == 10 * (len(context) + len(INVOCATION))


@pytest.mark.parametrize("first", ["base", "adapter"])
def test_adapters_that_come_together_compute_one_context_once(
    engine: MakeDriver, activated: list[AdapterRef], first: str
) -> None:
    driver = engine(block_size=4, max_num_batched_tokens=32)
    driver.engine.loader.read_ahead(activated)
    driver.wait_for_loads()
    context = prompt(120, seed=8)
    refs = [None if first == "base" else activated[0], *activated[1:], *activated]
    requests = [generate([*context, *INVOCATION], adapter=ref) for ref in refs]
    answers = driver.run(*requests, generate(prompt(9), adapter=activated[0]))
    assert [answer.cached for answer in answers] == [0, *[120] * (len(refs) - 1), 0]
    alone = [engine().tokens(request.token_ids, request.sampling, request.adapter) for request in requests]
    assert [answer.tokens for answer in answers[:-1]] == alone


def test_a_context_that_nobody_computes_any_more_is_not_waited_for(
    engine: MakeDriver, activated: list[AdapterRef]
) -> None:
    driver = engine(block_size=4, max_num_batched_tokens=32)
    driver.engine.loader.read_ahead(activated)
    driver.wait_for_loads()
    tokens = [*prompt(120, seed=8), *INVOCATION]
    gone, *others = (generate(tokens, adapter=ref) for ref in activated)
    for request in (gone, *others):
        driver.add(request)
    driver.step()
    assert len(driver.engine.scheduler.running) == 1
    driver.engine.add(Abort(gone.request_id))
    for _ in range(40):
        driver.step()
    assert all(driver.answers[request.request_id].done for request in others)


def test_what_the_base_computed_is_found_by_an_adapter_and_the_other_way_round(
    engine: MakeDriver, activated: list[AdapterRef]
) -> None:
    driver = engine(block_size=4)
    tokens = [*CONTEXT, *INVOCATION, *prompt(9, seed=6)]
    answers = [driver.run(generate(tokens, adapter=ref))[0] for ref in (None, activated[0], activated[1], activated[0])]
    assert [answer.cached for answer in answers] == [0, 16, 16, 28]  # whole blocks before 19; then all but the last
    driver = engine(block_size=4)
    answers = [driver.run(generate(tokens, adapter=ref))[0] for ref in (activated[0], None)]
    assert [answer.cached for answer in answers] == [0, 16]


def test_another_tenant_finds_nothing(engine: MakeDriver, activated: list[AdapterRef]) -> None:
    driver = engine(block_size=4)
    tokens = [*CONTEXT, *INVOCATION]
    driver.run(generate(tokens, cache_salt="one"))
    (answer,) = driver.run(generate(tokens, adapter=activated[0], cache_salt="two"))
    assert answer.cached == 0


def test_the_context_outlives_a_deleted_adapter(engine: MakeDriver, activated: list[AdapterRef]) -> None:
    driver = engine(block_size=4)
    tokens = [*CONTEXT, *INVOCATION, *prompt(9, seed=6)]
    driver.run(generate(tokens, adapter=activated[0]))
    driver.engine.add(EvictAdapter(activated[0].digest))
    driver.step()
    again = [driver.run(generate(tokens, adapter=ref))[0].cached for ref in (None, activated[0])]
    assert again == [16, 16]


def test_blocks_of_equal_tokens_are_told_apart_by_where_the_adapter_begins(
    engine: MakeDriver, tiny_base: Path, tmp_path: Path
) -> None:
    # The invocation [7, 7] at 1 and, if the block after begins with 7, at 3: the first blocks have the same tokens.
    ref = make_adapter(tiny_base, tmp_path / "a", targets=ALL, alora_invocation_tokens=[7, 7])
    early, late = [50, 7, 7, 7, 60, 61, 62, 63, 64], [50, 7, 7, 7, 7, 61, 62, 63, 64]
    assert [adapted_from(tokens, [7, 7]) for tokens in (early, late)] == [2, 3]
    want = [numbers(engine(block_size=4).run(scored(tokens, ref))[0]) for tokens in (early, late)]
    driver = engine(block_size=4)
    driver.run(generate(early, adapter=ref))
    (answer,) = driver.run(generate(late, sampling(max_tokens=6, logprobs=0), adapter=ref))
    assert answer.cached == 0
    assert [entry.logprob for entry in answer.logprobs] == want[1][len(late) - 1 :]


def test_a_preempted_sequence_goes_on_as_before(engine: MakeDriver, activated: list[AdapterRef]) -> None:
    requests = [([*prompt(11, seed=n), *INVOCATION], activated[n % 3]) for n in range(6)]
    want = [engine().tokens(tokens, sampling(max_tokens=24), ref) for tokens, ref in requests]
    driver = engine(kv_blocks=20, max_model_len=60)
    answers = driver.run(*(generate(tokens, sampling(max_tokens=24), adapter=ref) for tokens, ref in requests))
    assert driver.engine.stats().preemptions
    assert [answer.tokens for answer in answers] == want
