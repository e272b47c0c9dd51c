"""Adapters in the engine: loading, slots, eviction and failures, stepped by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tenora.adapters import upload
from tenora.adapters.ref import AdapterRef
from tenora.adapters.upload import Uploader
from tenora.engine import core
from tenora.engine.messages import (
    EvictAdapter,
    PinAdapter,
)
from tests.adapters.test_upload import PromptStreams
from tests.engine.driver import MakeDriver, make_adapter, ref_of
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
        assert gone.failure.code == "adapter_damaged"
        assert all(len(answer.tokens) == 8 for answer in others)
        assert tiny.engine.stats().adapter_load_failures == 1

    def test_a_malformed_adapter_says_what_is_wrong(
        self, driver: MakeDriver, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        directory = tmp_path / "broken"
        directory.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / name).write_bytes((Path(adapters[0].path) / name).read_bytes()[:-8])
        (answer,) = driver().run(generate([5], adapter=ref_of(directory)))
        assert answer.failure is not None
        assert answer.failure.code == "invalid_adapter"
        assert len(answer.failure.message) > 40

    def test_an_adapter_that_was_repaired_is_loaded(
        self, driver: MakeDriver, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        tiny = driver()
        late = AdapterRef(adapters[0].digest, str(tmp_path / "late"))
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
        assert big.failure.code == "adapter_too_large"
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
        assert answer.failure.code == "adapters_pinned"

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

    def test_content_that_is_used_again_while_an_old_stream_ends_keeps_its_pin_and_its_cache(
        self, driver: MakeDriver, adapters: list[AdapterRef]
    ) -> None:
        tiny = driver()
        request = generate(prompt(12), sampling(max_tokens=10), adapter=adapters[0])
        old = tiny.add(request)
        while not old.outputs:
            tiny.step()
        tiny.engine.add(EvictAdapter(adapters[0].digest))
        tiny.engine.add(PinAdapter(adapters[0]))
        while not old.done:
            tiny.step()
        assert tiny.engine.stats().adapters_resident == (adapters[0].digest,)
        for adapter in adapters[1:] * 2:
            tiny.tokens([5], sampling(max_tokens=1), adapter)
        assert adapters[0].digest in tiny.engine.stats().adapters_resident
        (again,) = tiny.run(generate(request.token_ids, request.sampling, adapter=adapters[0]))
        assert (again.cached, again.tokens) == (8, old.tokens)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_bit_that_changed_on_disk_is_never_served(
        self, name: str, driver: MakeDriver, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        """Every byte of both files counts: of the configuration, the header and the weights, first and last."""
        tiny = driver()
        stored = AdapterRef(adapters[1].digest, str(tmp_path / "stored"))
        shutil.copytree(adapters[1].path, stored.path)
        path = Path(stored.path) / name
        whole = path.read_bytes()
        places = [0, 1, 8, 100, len(whole) // 2, len(whole) - 1]
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
            damaged, other = tiny.run(generate([5], adapter=stored), generate([5], adapter=adapters[0]))
            assert damaged.failure is not None
            assert damaged.failure.code == "adapter_damaged", place
            assert stored.digest[:12] in damaged.failure.message
            assert len(other.tokens) == 8
        assert stored.digest not in tiny.engine.stats().adapters_resident
        path.write_bytes(whole)
        assert tiny.tokens([5], sampling(), stored) == tiny.tokens([5], sampling(), adapters[1])

    @pytest.mark.parametrize("scored", [False, True])
    def test_an_adapter_that_overflows_is_told_so_once_and_for_all(
        self, scored: bool, driver: MakeDriver, adapters: list[AdapterRef], tmp_path: Path
    ) -> None:
        shutil.copytree(adapters[0].path, tmp_path / "huge")
        weights = tmp_path / "huge" / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({name: value.sign() * 1e38 for name, value in tensors.items()}, weights)
        params = sampling(max_tokens=0, prompt_logprobs=0) if scored else sampling()
        overflowing = generate([5, 6, 7], params, adapter=ref_of(tmp_path / "huge"))
        bad, good = driver().run(overflowing, generate([5, 6, 7], adapter=adapters[0]))
        assert bad.failure is not None
        assert bad.failure.code == "adapter_overflow"
        assert len(good.tokens) == 8

    def test_sampling_that_overflows_is_a_bad_request(self, driver: MakeDriver) -> None:
        bad, good = driver().run(generate([5], sampling(repetition_penalty=5e-324)), generate([5]))
        assert bad.failure is not None
        assert bad.failure.code == "invalid_request"
        assert "repetition_penalty" in bad.failure.message
        assert len(good.tokens) == 8


def test_adapters_that_arrive_beside_the_steps_give_the_same_tokens(
    driver: MakeDriver, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: copied by a thread and a stream, evicted and copied again, in a ring far smaller than they."""
    requests = [
        generate(prompt(4 + index, index), sampling(max_tokens=8), adapter=adapters[index % len(adapters)])
        for index in range(16)
    ]
    wanted = [answer.tokens for answer in driver(max_adapters=3).run(*requests)]
    made: list[Uploader] = []

    def beside(device: torch.device, wake: Callable[[], None]) -> Uploader:
        made.append(Uploader(PromptStreams(), wake))
        return made[-1]

    monkeypatch.setattr(upload, "BLOCK_BYTES", 64)
    monkeypatch.setattr(core, "uploader_for", beside)
    tiny = driver(max_adapters=3)
    answers = tiny.run(*requests, steps=200_000)
    assert [answer.failure for answer in answers] == [None] * 16
    assert [answer.tokens for answer in answers] == wanted
    assert made
    assert tiny.engine.stats().adapter_evictions > 3
