"""Prefix tuning and prompt tuning as KV blocks: PEFT's numbers, for any number of virtual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers

from tenora.adapters.prepared import PreparedAdapter, prepare
from tenora.adapters.ref import AdapterRef
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.weights import AdapterPart, AdapterWeights
from tenora.engine.messages import EvictAdapter
from tenora.model.decoder import Decoder
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora_kernels.cpu.runtime.team import Team
from tests.engine.driver import Answer, Driver, MakeDriver, peft_warnings
from tests.engine.requests import generate, prompt, sampling
from tests.support.tiny import build_tiny

CONFIGS: dict[str, Callable[..., Any]] = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
BLOCK = 4
COUNTS = (8, 6, 3)  # whole blocks, some and a rest, less than one


class Virtual(NamedTuple):
    """An adapter of virtual tokens, and PEFT's model of it."""

    ref: AdapterRef
    prepared: PreparedAdapter
    count: int
    model: Any


def made(base: Path, kind: str, count: int, rows: TableRows) -> Virtual:
    """A random adapter of a kind with so many virtual tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = CONFIGS[kind](task_type="CAUSAL_LM", num_virtual_tokens=count)
    with peft_warnings():
        adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(count)
    for name, parameter in adapted.named_parameters():
        if "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.7)
    values = adapted.get_prompt_embedding_to_save("default").numpy()
    nothing = values[:, :0]
    if kind == "prompt":
        parts = [AdapterPart(RowKind.PROMPT, "", values, nothing)]
    else:  # keys and values of layer after layer, side by side
        of_layer = values.reshape(count, len(rows.layers), -1).swapaxes(0, 1)
        parts = [
            AdapterPart(RowKind.PREFIX, path, part, nothing) for path, part in zip(rows.layers, of_layer, strict=True)
        ]
    weights = AdapterWeights({}, 0, (), {}, values.nbytes, tuple(parts))
    prepared = prepare(weights, rows, dtype=torch.float32, device=torch.device("cpu"))
    return Virtual(AdapterRef(f"{kind}-{count}", "/nowhere"), prepared, count, adapted)


@pytest.fixture(scope="module")
def virtual(tiny_base: Path) -> dict[str, Virtual]:
    """Adapters of both kinds, by digest."""
    rows = table_rows(load_decoder(tiny_base).spec)
    found = [made(tiny_base, kind, count, rows) for kind in CONFIGS for count in COUNTS]
    return {each.ref.digest: each for each in found}


@pytest.fixture(scope="module", params=["modules", "compiled"])
def base(request: pytest.FixtureRequest, tiny_base: Path) -> Decoder:
    """The tiny base on both executors of a CPU."""
    return load_decoder(tiny_base, team=Team(1) if request.param == "compiled" else None)


@pytest.fixture
def engine(base: Decoder, virtual: dict[str, Virtual]) -> Iterator[MakeDriver]:
    made: list[Driver] = []

    def make(**given: Any) -> Driver:
        made.append(Driver(base, block_size=BLOCK, **given))
        for each in virtual.values():
            made[-1].engine.loader.offer(each.ref.digest, each.prepared)
        return made[-1]

    yield make
    for each in made:
        each.close()


def scored(tokens: list[int], adapter: AdapterRef | None, **given: Any) -> Any:
    return generate(tokens, sampling(max_tokens=6, logprobs=0, prompt_logprobs=0), adapter=adapter, **given)


def numbers(answer: Answer) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first, then of the answer's."""
    assert answer.failure is None
    entries = [*(answer.outputs[0].prompt_logprobs or ())[1:], *answer.logprobs]
    return [entry.logprob for entry in entries if entry is not None]


def wanted(adapter: Virtual, ids: list[int]) -> torch.Tensor:
    """PEFT's log-probabilities of all tokens but the first."""
    with torch.no_grad(), peft_warnings():
        logits = adapter.model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
    return torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


def test_logits_are_those_of_peft(engine: MakeDriver, virtual: dict[str, Virtual]) -> None:
    driver = engine()
    for seed, adapter in enumerate(virtual.values()):
        for length in (1, 2, 13):
            tokens = prompt(length, seed)
            (answer,) = driver.run(scored(tokens, adapter.ref))
            difference = torch.tensor(numbers(answer)) - wanted(adapter, tokens + answer.tokens)
            assert difference.abs().max() < 1e-5


def test_a_long_prefix_is_computed_in_passes_like_a_prompt(base: Decoder, tiny_base: Path) -> None:
    adapter = made(tiny_base, "prompt", 21, table_rows(base.spec))
    driver = Driver(base, block_size=BLOCK, max_num_batched_tokens=16)
    driver.engine.loader.offer(adapter.ref.digest, adapter.prepared)
    tokens = prompt(11)
    (answer,) = driver.run(scored(tokens, adapter.ref))
    assert (torch.tensor(numbers(answer)) - wanted(adapter, tokens + answer.tokens)).abs().max() < 1e-5
    driver.close()


def test_a_mixed_batch_gives_the_bits_of_each_alone(
    base: Decoder, engine: MakeDriver, virtual: dict[str, Virtual], adapters: list[AdapterRef]
) -> None:
    refs = [*(adapter.ref for adapter in virtual.values()), adapters[1], None]
    cases = [(prompt(length, seed), ref) for seed, ref in enumerate(refs) for length in (5, 12)]
    alone = [numbers(engine().run(scored(tokens, ref))[0]) for tokens, ref in cases]
    together = engine(max_num_seqs=32)
    together.engine.loader.read_ahead([adapters[1]])
    together.wait_for_loads()
    mixed = [numbers(answer) for answer in together.run(*(scored(tokens, ref) for tokens, ref in cases))]
    if base.stack is not None:
        assert mixed == alone
    else:  # torch's products depend on the number of rows
        for found, want in zip(mixed, alone, strict=True):
            assert found == pytest.approx(want, abs=1e-4)


def test_whole_blocks_of_a_prefix_are_laid_once_and_shared(
    engine: MakeDriver, virtual: dict[str, Virtual], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = engine()
    laid: list[tuple[int, int]] = []
    lay = driver.engine.scheduler.prefixes.lay  # type: ignore[union-attr]  # an engine has one

    def counting(slot: int, start: int, blocks: list[int]) -> None:
        laid.append((start, blocks[0]))
        lay(slot, start, blocks)

    monkeypatch.setattr(driver.engine.scheduler.prefixes, "lay", counting)
    for digest, starts in (("prefix-8", [0]), ("prefix-6", [0, 4, 4]), ("prompt-3", [0, 0, 0])):
        laid.clear()
        driver.run(*(generate(prompt(7, seed), adapter=virtual[digest].ref) for seed in range(3)))
        assert [start for start, _ in laid] == starts
        assert len({block for start, block in laid if start}) <= 1, "they share the blocks before it"


def test_the_prefix_cache_finds_prompts_behind_a_prefix(engine: MakeDriver, virtual: dict[str, Virtual]) -> None:
    for digest, found in (("prefix-8", 12), ("prefix-6", 10), ("prompt-3", 9)):  # positions up to a whole block
        driver = engine()
        tokens = prompt(13)
        first, again, other = (
            driver.run(scored(tokens, virtual[digest].ref))[0],
            *(
                driver.run(generate(tokens, sampling(6, logprobs=0), adapter=virtual[digest].ref, cache_salt=salt))[0]
                for salt in ("", "another tenant")
            ),
        )
        assert [answer.cached for answer in (first, again, other)] == [0, found, 0]
        assert [entry.logprob for entry in again.logprobs] == pytest.approx(numbers(first)[12:], abs=1e-4)


def test_prompts_behind_one_prefix_are_told_apart(engine: MakeDriver, virtual: dict[str, Virtual]) -> None:
    for digest in ("prefix-8", "prefix-6", "prompt-3"):
        driver = engine()
        common = prompt(6)
        for last in (50, 51, 52):
            tokens = [last, *common[1:], last, 9]
            (answer,) = driver.run(scored(tokens, virtual[digest].ref))
            want = wanted(virtual[digest], tokens + answer.tokens)
            assert (torch.tensor(numbers(answer)) - want).abs().max() < 1e-5
            (again,) = driver.run(generate(tokens, sampling(6, logprobs=0), adapter=virtual[digest].ref))
            assert again.cached
            assert [entry.logprob for entry in again.logprobs] == pytest.approx(want[-6:].tolist(), abs=1e-5)


def test_a_prompt_that_does_not_fit_behind_its_prefix_is_refused(
    engine: MakeDriver, virtual: dict[str, Virtual]
) -> None:
    driver = engine(max_model_len=20)
    refused, fits, beside = driver.run(
        generate(prompt(12), adapter=virtual["prefix-8"].ref),
        generate(prompt(11), sampling(9), adapter=virtual["prefix-8"].ref),
        generate(prompt(19), sampling(9)),
    )
    assert refused.failure is not None
    assert refused.failure.code == "context_length_exceeded"
    assert (
        "12 tokens, the adapter puts 8 virtual ones before it, and the model's context is 20" in refused.failure.message
    )
    assert [(len(answer.tokens), answer.finish_reason) for answer in (fits, beside)] == [(1, "length")] * 2


def test_a_failure_to_lay_a_prefix_ends_its_sequence_alone(
    engine: MakeDriver, virtual: dict[str, Virtual], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = engine()

    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("tenora.engine.prefixes.write_virtual_tokens", broken)
    failed, beside = driver.run(generate(prompt(5), adapter=virtual["prefix-8"].ref), generate(prompt(5)))
    assert failed.failure is not None
    assert failed.failure.code == "adapter_unavailable"
    assert len(beside.tokens) == 8
    monkeypatch.undo()
    assert driver.tokens(prompt(5), sampling(), virtual["prefix-8"].ref), "the next one tries again"


def test_a_deleted_adapter_leaves_no_block_behind(engine: MakeDriver, virtual: dict[str, Virtual]) -> None:
    driver = engine()
    adapter = virtual["prefix-8"]
    driver.run(generate(prompt(9), adapter=adapter.ref))
    driver.engine.add(EvictAdapter(adapter.ref.digest))
    driver.step()
    assert not driver.engine.blocks._hash_of
    driver.engine.loader.offer(adapter.ref.digest, adapter.prepared)
    (answer,) = driver.run(generate(prompt(9), adapter=adapter.ref))
    assert answer.cached == 0


def test_a_preempted_sequence_goes_on_as_before(engine: MakeDriver, virtual: dict[str, Virtual]) -> None:
    refs = [virtual[name].ref for name in ("prefix-8", "prefix-6", "prompt-6", "prompt-3")]
    requests = [(prompt(11, seed), ref) for seed, ref in enumerate(refs)]
    want = [engine().tokens(tokens, sampling(max_tokens=24), ref) for tokens, ref in requests]
    driver = engine(kv_blocks=24, max_model_len=60)
    answers = driver.run(*(generate(tokens, sampling(max_tokens=24), adapter=ref) for tokens, ref in requests))
    assert driver.engine.stats().preemptions
    assert [answer.tokens for answer in answers] == want


def test_a_base_that_rotates_by_length_refuses_virtual_tokens(tmp_path: Path) -> None:
    path = build_tiny(tmp_path / "base", "dynamic_rope")
    driver = Driver(load_decoder(path), block_size=BLOCK)
    adapter = made(path, "prefix", 4, driver.engine.rows)
    driver.engine.loader.offer(adapter.ref.digest, adapter.prepared)
    (answer,) = driver.run(generate(prompt(5), adapter=adapter.ref))
    assert answer.failure is not None
    assert "depend on the length" in answer.failure.message
    driver.close()
