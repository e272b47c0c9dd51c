"""What the engine takes of a device, in numbers: Llama-3-8B in bfloat16 on GPUs of 24, 80 and 141 GB, and on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tenora.config import Settings
from tenora.engine import core
from tenora.engine.core import Engine
from tenora.engine.model_runner import ModelRunner
from tenora.engine.rehearsal import rehearse
from tenora.engine.resources import Facts, Resources, activation_bytes, graph_bytes, resources
from tenora.errors import ConfigurationError
from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.decode_graphs import decode_sizes
from tests.bench.gpu.engine_loop import llama_8b

SPEC = llama_8b()
WEIGHTS = 16_060_000_000
PER_TOKEN = KVCache.bytes_per_block(SPEC, 1, torch.bfloat16)  # 131 kB


def gpu(gigabytes: float, *, weights: int = WEIGHTS) -> Facts:
    """A GPU with the base on it; its driver and this process have taken 1.5 % of the rest."""
    return Facts("cuda", int(gigabytes * 1e9), int(gigabytes * 0.985e9), weights)


def on(facts: Facts, activations: int = 0, **settings: object) -> Resources:
    return resources(facts, SPEC, Settings(**settings), dtype=torch.bfloat16, activations=activations)  # type: ignore[arg-type]


def test_a_cpu_keeps_what_it_has() -> None:
    found = on(Facts("cpu"))
    assert found == Resources(64, 512, 512 * 2**20, 512 * 2**20, 0)
    assert on(Facts("cpu"), kv_cache_bytes=2**20, max_num_seqs=3).kv_cache_bytes == 2**20


@pytest.mark.parametrize(
    ("gigabytes", "tokens", "seqs", "cached"),
    [(24, 2048, 64, (5_000, 10_000)), (80, 8192, 256, (280_000, 360_000)), (141, 8192, 256, (600_000, 740_000))],
)
def test_an_8b_base_gets_the_keys_and_values_that_its_card_holds(
    gigabytes: int, tokens: int, seqs: int, cached: tuple[int, int]
) -> None:
    """512 MiB on any device were 4,096 tokens in all."""
    found = on(gpu(gigabytes))
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (tokens, seqs)
    assert cached[0] <= found.kv_cache_bytes // PER_TOKEN <= cached[1]
    everything = WEIGHTS + found.kv_cache_bytes + found.adapter_pool_bytes + found.training_bytes
    assert everything < 0.9 * gpu(gigabytes).free


def test_a_card_that_does_not_train_has_the_tenth_for_keys_and_values() -> None:
    trains, serves = on(gpu(80)), on(gpu(80), role="serve")
    assert serves.training_bytes == 0
    assert trains.training_bytes == pytest.approx(0.1 * gpu(80).free, rel=0.01)
    assert serves.kv_cache_bytes - trains.kv_cache_bytes == trains.training_bytes


def test_what_a_step_was_seen_to_take_comes_off_the_keys_and_values() -> None:
    estimated, seen = on(gpu(80)), on(gpu(80), activations=9 * 10**9)
    assert 5e9 < estimated.kv_cache_bytes - seen.kv_cache_bytes < 9e9
    assert on(gpu(80), activations=1).kv_cache_bytes == estimated.kv_cache_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [("kv_cache_bytes", 2**30), ("adapter_pool_bytes", 2**31), ("max_num_seqs", 7), ("max_num_batched_tokens", 100)],
)
def test_what_is_set_is_taken_as_it_is_set(name: str, value: int) -> None:
    found = on(gpu(141), **{name: value})
    assert getattr(found, name) == value
    assert name not in found.chosen(Settings(**{name: value}))  # type: ignore[arg-type]
    assert getattr(found.settle(Settings(**{name: value})), name) == value  # type: ignore[arg-type]
    others = {"kv_cache_bytes", "adapter_pool_bytes", "max_num_seqs", "max_num_batched_tokens"} - {name}
    assert set(found.chosen(Settings(**{name: value}))) == others  # type: ignore[arg-type]


def test_a_base_that_leaves_no_room_is_refused_with_what_takes_how_much() -> None:
    with pytest.raises(ConfigurationError, match=r"of 15\.8 GB .* weights 16\.1 GB.*TENORA_ROLE=serve"):
        on(gpu(16))
    with pytest.raises(ConfigurationError, match=r"training 1\.8 GB"):
        on(gpu(18.5))
    assert on(gpu(22), role="serve").kv_cache_bytes > 2048 * PER_TOKEN


def test_a_tight_card_gets_fewer_sequences_and_slots_before_it_is_refused() -> None:
    tight, roomy = on(gpu(24)), on(gpu(32))
    assert (tight.max_num_seqs, tight.adapter_pool_bytes) == (64, 512 * 2**20)
    assert (roomy.max_num_seqs, roomy.adapter_pool_bytes) == (256, int(0.05 * gpu(32).free))
    assert on(gpu(24), max_num_seqs=200, role="serve").max_num_seqs == 200


def test_more_than_the_gpu_has_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(ConfigurationError, match=r"TENORA_KV_CACHE_BYTES .* 70\.0 GB, but of 78\.8 GB .*16\.1 GB"):
        on(gpu(80), kv_cache_bytes=70 * 10**9, adapter_pool_bytes=2**20)


def test_sizes_of_decode_steps() -> None:
    """129 rows ran as 256."""
    assert decode_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert decode_sizes(256)[-13:] == (64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)
    assert [decode_sizes(most) for most in (1, 2, 5, 6, 11)] == [
        (1,),
        (1, 2),
        (1, 2, 4, 5),
        (1, 2, 4, 6),
        (1, 2, 4, 8, 11),
    ]
    assert next(size for size in decode_sizes(256) if size >= 129) == 144


def test_graphs_are_counted_per_size_and_bound() -> None:
    one = graph_bytes(SPEC, 1, 16)
    assert graph_bytes(SPEC, 1, 256) == one * 3 // 2
    assert graph_bytes(SPEC, 2, 16) == 2 * one


def test_settings_say_0_or_enough() -> None:
    for name, bad in (("kv_cache_bytes", 5), ("adapter_pool_bytes", 2**20 - 1), ("max_num_batched_tokens", 15)):
        with pytest.raises(ValueError, match="must be 0 or at least"):
            Settings(**{name: bad})  # type: ignore[arg-type]
        assert getattr(Settings(**{name: 0}), name) == 0  # type: ignore[arg-type]


def test_the_engine_says_what_it_settled_on(decoder: Decoder) -> None:
    ready = Engine(decoder, Settings(max_adapters=2, max_num_seqs=3)).ready
    assert ready.memory == {
        "block_size": 16,
        "kv_cache_bytes": 512 * 2**20,
        "adapter_pool_bytes": 512 * 2**20,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 512,
    }


def test_flash_attention_is_looked_for_before_a_base_is_loaded_on_a_gpu(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def activate(device: torch.device) -> str:
        asked.append(device)
        raise ConfigurationError("far enough")

    gpu = torch.device("cuda")
    monkeypatch.setattr(core, "resolve_device", lambda _: gpu)
    monkeypatch.setattr(core, "resolve_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(core, "activate", activate)
    with pytest.raises(ConfigurationError, match="far enough"):
        Engine.load(Settings(threads=1), tiny_base)
    assert asked == [gpu]


@pytest.mark.parametrize(("tokens", "seqs"), [(48, 6), (16, 64), (2000, 2)])
def test_the_rehearsed_step_is_the_largest_there_can_be(
    decoder: Decoder, tokens: int, seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    run = ModelRunner.run

    def counted(self: ModelRunner, batch: object) -> object:
        results = run(self, batch)  # type: ignore[arg-type]
        seen.append((sum(item.count for item in batch), sum(result.token is not None for result in results)))  # type: ignore[attr-defined]
        return results

    monkeypatch.setattr(ModelRunner, "run", counted)
    rehearse(decoder, tokens=tokens, seqs=seqs, block_size=4)()
    most = decoder.spec.max_position_embeddings
    rows = min(seqs, tokens)
    assert seen == [(rows * min(tokens // rows, most), rows)]


def test_a_step_is_reckoned_with_the_context_that_a_rope_scaling_gives() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = dataclasses.replace(SPEC, rope_parameters=yarn, max_position_embeddings=8192)
    plain = dataclasses.replace(SPEC, max_position_embeddings=4 * 8192)
    for spec in (scaled, plain):
        assert spec.context_length == 4 * 8192
    assert activation_bytes(scaled, 512, 8, torch.bfloat16) == activation_bytes(plain, 512, 8, torch.bfloat16)
