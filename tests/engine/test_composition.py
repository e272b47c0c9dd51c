"""Several adapters as one: peft's `add_weighted_adapter` is the oracle, the engine is stepped by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import peft
import peft.tuners.lora.model as lora_model
import pytest
import torch
from torch import Tensor

from tenora.adapters.composition import compose
from tenora.adapters.ref import AdapterRef, Part
from tenora.engine import deletions
from tenora.engine.messages import EvictAdapter, Generate
from tests.engine.driver import Driver, MakeDriver, load_peft, make_adapter, peft_warnings
from tests.engine.requests import generate, prompt, sampling
from tests.support.tiny import VOCAB

PROMPT = prompt(9, 1)
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qv": {"rank": 4, "targets": ("q_proj", "v_proj")},
    "vd": {"rank": 4, "targets": ("v_proj", "down_proj"), "use_rslora": True, "alpha": 3},
    "small": {"rank": 2, "targets": ("k_proj", "v_proj", "up_proj")},
}


@pytest.fixture(scope="module")
def refs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRef]:
    root = tmp_path_factory.mktemp("parts")
    return {
        name: make_adapter(tiny_base, root / name, seed=seed, narrow=False, **dict(shape))
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


def parts(refs: Mapping[str, AdapterRef], **weights: float) -> list[Part]:
    """In the order of the digests, as a composition has them, so that peft gets them in that order too."""
    found = [Part(refs[name].digest, refs[name].path, weight) for name, weight in weights.items()]
    return sorted(found, key=lambda part: part.digest)


def asking(adapter: AdapterRef | None) -> Generate:
    """For all log-probabilities at all places of the prompt."""
    return generate(PROMPT, sampling(max_tokens=1, logprobs=VOCAB, prompt_logprobs=VOCAB), adapter=adapter)


def logprobs(driver: Driver, adapter: AdapterRef | None) -> Tensor:
    """[len(PROMPT), vocab]: of what follows each token of the prompt."""
    (answer,) = driver.run(asking(adapter))
    assert answer.failure is None, answer.failure
    (output,) = answer.outputs
    entries = [*(entry for entry in output.prompt_logprobs or () if entry), *answer.logprobs]
    found = torch.empty(len(entries), VOCAB)
    for row, entry in zip(found, entries, strict=True):
        ids, values = zip(*entry.top, strict=True)
        row[torch.tensor(ids)] = torch.tensor(values)
    return found


def of_peft(base: Path, chosen: list[Part], combination: str, seed: int, **options: Any) -> Tensor:
    """The same from peft, which draws from torch's own generator, after it has drawn weights that it overwrites."""
    first, *others = [AdapterRef(part.digest, part.path) for part in chosen]
    model = load_peft(base, first)
    names = ["default"]
    for number, other in enumerate(others):
        names.append(f"part{number}")
        with peft_warnings():
            model.load_adapter(other.path, adapter_name=names[-1])

    def seeded(*_: Any) -> None:
        torch.manual_seed(seed)

    with peft_warnings(), mock.patch.object(lora_model, "_freeze_adapter", seeded):
        model.add_weighted_adapter(names, [part.weight for part in chosen], "all", combination, **options)
    model.set_adapter("all")
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "all" in module.scaling:
            module.scaling["all"] = 1.0  # as it is meant; peft scales by √rank if the first adapter is an rsLoRA one
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)


CASES: tuple[tuple[str, dict[str, float], dict[str, Any]], ...] = (
    ("cat", {"qv": 0.7, "small": 0.5}, {}),
    ("cat", {"qv": 1.5, "vd": -0.5, "small": 1.0}, {}),
    ("svd", {"qv": 0.7, "vd": 0.5, "small": -1.0}, {}),
    ("linear", {"qv": 0.7, "vd": -0.4}, {}),
    ("ties", {"qv": 0.7, "vd": 0.4}, {"density": 0.4}),
    ("ties", {"qv": 0.7, "vd": 0.4}, {"density": 0.7, "majority_sign_method": "frequency"}),
    ("dare_linear", {"qv": 0.7, "vd": 0.4}, {"density": 0.5}),
    ("dare_ties", {"qv": 0.7, "vd": 0.4}, {"density": 0.6, "majority_sign_method": "frequency"}),
)


@pytest.mark.parametrize(("combination", "weights", "options"), CASES, ids=lambda value: str(value)[:16])
def test_a_composition_is_what_peft_makes_of_it(
    driver: MakeDriver,
    tiny_base: Path,
    refs: dict[str, AdapterRef],
    combination: Any,
    weights: dict[str, float],
    options: dict[str, Any],
) -> None:
    chosen = parts(refs, **weights)
    composed = compose(chosen, combination, **options)
    assert composed is not None
    tiny = driver()
    ours = logprobs(tiny, composed)
    seed = int(composed.digest[:15], 16)
    theirs = of_peft(tiny_base, chosen, combination, seed, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=3e-6)
    # It can fail: another weight is out of tolerance.
    other = [msgspec.structs.replace(chosen[0], weight=chosen[0].weight + 0.05), *chosen[1:]]
    assert (ours - of_peft(tiny_base, other, combination, seed, **options)).abs().max() > 1e-3


def test_scale_0_is_the_base_and_scale_1_of_one_adapter_is_itself(refs: dict[str, AdapterRef]) -> None:
    assert compose(parts(refs, qv=0.7, vd=0.5), "ties", scale=0.0) is None
    assert compose(parts(refs, qv=0.0), "cat") is None
    assert compose(parts(refs, qv=1.0)) == refs["qv"]
    assert compose(parts(refs, qv=0.5), "svd", scale=2.0) == refs["qv"]
    assert compose(parts(refs, qv=1.0, vd=0.0), "linear") == refs["qv"]


def test_a_scale_multiplies_all_of_an_adapter(driver: MakeDriver, tiny_base: Path, refs: dict[str, AdapterRef]) -> None:
    """Its matrices keep their bits: only the scaling differs."""
    tiny = driver()
    scaled = compose(parts(refs, vd=1.0), scale=1.25)
    ours = logprobs(tiny, scaled)
    assert scaled is not None
    slot = tiny.engine.pool.acquire(scaled.digest)
    model = load_peft(tiny_base, refs["vd"])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(1.25)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=3e-6)
    tiny.engine.loader.release(scaled.digest)
    logprobs(tiny, refs["vd"])
    plain = tiny.engine.pool.acquire(refs["vd"].digest)
    assert slot is not None
    assert plain is not None
    tables = tiny.engine.pool.tables
    for row in tables.ranks[:, plain].nonzero().flatten().tolist():
        assert torch.equal(tables.a(row, slot), tables.a(row, plain))
        assert float(tables.scaling[row, slot]) == pytest.approx(1.25 * float(tables.scaling[row, plain]))
    tiny.engine.loader.release(refs["vd"].digest)


def test_requests_that_mean_the_same_share_one_composition(driver: MakeDriver, refs: dict[str, AdapterRef]) -> None:
    chosen = parts(refs, qv=0.7, vd=0.5)
    doubled = [msgspec.structs.replace(part, weight=part.weight * 2) for part in chosen]
    same = [
        compose(chosen),
        compose(list(reversed(chosen))),
        compose(doubled, scale=0.5),
        compose(chosen, density=0.3, majority_sign_method="frequency"),
        compose([*chosen, *parts(refs, small=0.0)]),
    ]
    assert len({one.digest for one in same if one is not None}) == 1
    others = [
        compose(chosen, "linear"),
        compose(chosen, "ties"),
        compose(chosen, "ties", density=0.4),
        compose(chosen, "ties", majority_sign_method="frequency"),
        compose(chosen, scale=1.5),
        compose(parts(refs, qv=0.7, small=0.5)),
    ]
    assert len({one.digest for one in others if one is not None} | {same[0].digest if same[0] else ""}) == 7
    tiny = driver()
    answers = tiny.run(*(generate(PROMPT, adapter=one) for one in same))
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert tiny.engine.stats().adapter_loads == 1
    again, alone = tiny.run(generate(PROMPT, adapter=same[1])), tiny.run(generate(PROMPT, adapter=refs["qv"]))
    assert again[0].cached > 0, "the same composition finds its own keys and values"
    assert alone[0].cached == 0, "and nobody else does"


def test_a_composition_goes_with_the_first_of_its_parts(driver: MakeDriver, refs: dict[str, AdapterRef]) -> None:
    tiny = driver(host_cache_bytes=2**24)
    composed, other = compose(parts(refs, qv=0.7, vd=0.5)), compose(parts(refs, vd=0.7, small=0.5))
    assert composed is not None
    assert other is not None
    first = tiny.tokens(PROMPT, sampling(), composed)
    tiny.tokens(PROMPT, sampling(), other)
    running = tiny.add(generate(PROMPT, sampling(max_tokens=12), adapter=composed))
    while not running.outputs:
        tiny.step()
    tiny.engine.add(EvictAdapter(refs["qv"].digest))
    tiny.step()
    assert composed.digest in tiny.engine.stats().adapters_resident, "a sequence uses it"
    while not running.done:
        tiny.step()
    tiny.step()
    assert set(tiny.engine.stats().adapters_resident) == {other.digest}
    assert composed.digest not in tiny.engine.loader.held()
    assert composed.digest not in tiny.engine.blocks.adapters()
    assert other.digest in tiny.engine.blocks.adapters()
    # Stored again, it is composed again.
    (answer,) = tiny.run(generate(PROMPT, adapter=composed))
    assert (answer.tokens, answer.cached) == (first, 0)


def test_compositions_that_nothing_is_held_of_are_not_remembered(
    driver: MakeDriver, refs: dict[str, AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletions, "_KEPT", 3)
    tiny = driver(max_adapters=1, kv_blocks=16, host_cache_bytes=2**16)
    for number in range(12):
        composed = compose(parts(refs, qv=0.7 + 0.01 * number))
        tiny.tokens(prompt(24, number), sampling(max_tokens=1), composed)
    known = tiny.engine._deletions._compositions
    assert composed is not None
    assert composed.digest in known
    assert len(known) <= 2 * len(tiny.engine._held()) + 1 < 12


def test_what_does_not_compose_fails_alone_and_says_why(driver: MakeDriver, refs: dict[str, AdapterRef]) -> None:
    tiny = driver(max_lora_rank=8)
    much = compose(parts(refs, qv=0.7, vd=0.5, small=0.5))
    unequal = compose(parts(refs, qv=0.7, small=0.5), "linear")
    alone = tiny.tokens(PROMPT, sampling(), refs["qv"])
    answers = tiny.run(*(generate(PROMPT, adapter=one) for one in (much, unequal, refs["qv"])))
    failures = [answer.failure for answer in answers]
    assert [failure.code if failure else None for failure in failures] == ["adapters_do_not_compose"] * 2 + [None]
    assert "10 together" in (failures[0].message if failures[0] else "")
    assert "of one rank" in (failures[1].message if failures[1] else "")
    assert answers[2].tokens == alone
