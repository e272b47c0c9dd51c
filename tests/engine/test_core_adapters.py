"""Adapters in the engine: loading, slots, eviction and failures, stepped by hand."""

from __future__ import annotations

from pathlib import Path

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import (
    EvictAdapter,
    PinAdapter,
)
from tests.engine.driver import MakeDriver, make_adapter
from tests.engine.requests import generate, prompt, sampling


class TestAdapters:
    def test_many_more_adapters_than_slots(self, driver: MakeDriver, adapters: list[AdapterRef]) -> None:
        tiny = driver(max_adapters=2)
        requests = [generate(prompt(6, seed), sampling(max_tokens=6), adapter=adapters[seed % 8]) for seed in range(24)]
        answers = tiny.run(*requests)
        alone = driver()
        for request, answer in zip(requests, answers, strict=True):
            assert answer.tokens == alone.run(request)[0].tokens
        stats = tiny.engine.stats()
        assert stats.adapter_evictions >= 6
        assert len(stats.adapters_resident) == 2

    def test_a_missing_adapter_fails_its_own_requests(self, driver: MakeDriver, adapters: list[AdapterRef]) -> None:
        tiny = driver()
        missing = AdapterRef(digest="gone", path="/nowhere/at/all")
        requests = [generate([5], adapter=missing), generate([5], adapter=adapters[0]), generate([5])]
        gone, *others = tiny.run(*requests)
        assert gone.failure is not None
        assert gone.failure.code == "adapter_unavailable"
        assert all(len(answer.tokens) == 8 for answer in others)
        assert tiny.engine.stats().adapter_load_failures == 1

    def test_a_malformed_adapter_says_what_is_wrong(
        self, driver: MakeDriver, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        directory = tmp_path / "broken"
        directory.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / name).write_bytes((Path(adapters[0].path) / name).read_bytes()[:-8])
        (answer,) = driver().run(generate([5], adapter=AdapterRef("broken", str(directory))))
        assert answer.failure is not None
        assert answer.failure.code == "adapter_unavailable"
        assert len(answer.failure.message) > 40

    def test_an_adapter_that_was_repaired_is_loaded(
        self, driver: MakeDriver, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        tiny = driver()
        late = AdapterRef("late", str(tmp_path / "late"))
        (answer,) = tiny.run(generate([5], adapter=late))
        assert answer.failure is not None
        (tmp_path / "late").symlink_to(adapters[0].path)
        (answer,) = tiny.run(generate([5], adapter=late))
        assert answer.tokens == tiny.tokens([5], sampling(), adapters[0])

    def test_an_adapter_larger_than_the_pool_is_refused(
        self, driver: MakeDriver, tiny_base: Path, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        huge = make_adapter(tiny_base, tmp_path / "huge", rank=256, targets=("gate_proj", "up_proj", "down_proj"))
        big, small = driver(max_lora_rank=256).run(generate([5], adapter=huge), generate([5], adapter=adapters[0]))
        assert big.failure is not None
        assert big.failure.code == "adapter_unavailable"
        assert len(small.tokens) == 8

    def test_pinned_adapters_stay(self, driver: MakeDriver, adapters: list[AdapterRef]) -> None:
        tiny = driver(max_adapters=2)
        tiny.engine.add(PinAdapter(adapters[0]))
        tiny.step()
        tiny.step()
        assert tiny.engine.stats().adapters_resident == (adapters[0].digest,)
        for adapter in adapters[1:4]:
            tiny.tokens([5], sampling(max_tokens=1), adapter)
        assert adapters[0].digest in tiny.engine.stats().adapters_resident
        tiny.engine.add(PinAdapter(adapters[0], pinned=False))
        for adapter in adapters[1:4]:
            tiny.tokens([5], sampling(max_tokens=1), adapter)
        assert adapters[0].digest not in tiny.engine.stats().adapters_resident

    def test_pinning_a_missing_adapter_does_no_harm(self, driver: MakeDriver) -> None:
        tiny = driver()
        tiny.engine.add(PinAdapter(AdapterRef("gone", "/nowhere")))
        for _ in range(3):
            tiny.step()
        assert not tiny.engine.has_work
        assert tiny.tokens([5], sampling(max_tokens=1))

    def test_when_everything_is_pinned_requests_are_told(self, driver: MakeDriver, adapters: list[AdapterRef]) -> None:
        tiny = driver(max_adapters=1)
        tiny.engine.add(PinAdapter(adapters[0]))
        tiny.step()
        tiny.step()
        (answer,) = tiny.run(generate([5], adapter=adapters[1]))
        assert answer.failure is not None
        assert "pinned" in answer.failure.message

    def test_a_deleted_version_goes_when_its_last_sequence_ends(
        self, driver: MakeDriver, adapters: list[AdapterRef]
    ) -> None:
        tiny = driver()
        request = generate(prompt(12), sampling(max_tokens=10), adapter=adapters[0])
        answer = tiny.add(request)
        while not answer.outputs:
            tiny.step()
        tiny.engine.add(EvictAdapter(adapters[0].digest))
        while not answer.done:
            assert adapters[0].digest in tiny.engine.stats().adapters_resident
            tiny.step()
        assert answer.failure is None
        assert tiny.engine.stats().adapters_resident == ()
        for expected in (0, 8):  # its cached prefixes went, too
            (again,) = tiny.run(generate(request.token_ids, request.sampling, adapter=adapters[0]))
            assert again.cached == expected
            assert again.tokens == answer.tokens
