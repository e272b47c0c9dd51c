"""`make gpu-check` as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tenora.config import Settings
from tenora.engine.core import Engine
from tenora.model.spec import ModelSpec, target_modules
from tests.bench.gpu import check, decode_loop, engine_loop, groups, mixed_loop, service, stream_loop, training_pass
from tests.bench.gpu.engine_loop import AnyRank, EngineLoop, compare, llama_8b
from tests.bench.gpu.protocol import DISTRIBUTIONS, LLAMA, Measurement, decode_cases, prefill_cases, spread
from tests.bench.gpu.timing import summary
from tests.engine.graphs import HostRows, Rerun
from tests.support.patience import PATIENCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_exits_3(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu.check"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "There is no GPU" in done.stdout


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions(distribution: str) -> None:
    slots = Measurement(LLAMA[0], 64, distribution=distribution).slots()
    assert slots == Measurement(LLAMA[0], 64, distribution=distribution).slots()
    used = len(set(slots))
    assert sorted(set(slots)) == list(range(used)), "slots must leave no gap"
    wanted = {"distinct": (64, 64), "uniform": (8, 8), "identical": (1, 1), "zipf": (5, 40)}[distribution]
    assert wanted[0] <= used <= wanted[1]


def test_an_unknown_distribution_is_refused() -> None:
    import random

    with pytest.raises(ValueError, match="no distribution is called"):
        spread("even", 4, random.Random(0))


def test_the_protocol_is_complete() -> None:
    decode, prefill = list(decode_cases()), list(prefill_cases())
    names = [case.name for case in (*decode, *prefill)]
    assert len(set(names)) == len(names)
    assert {case.rows for case in decode} == {1, 8, 32, 64, 128, 256}
    assert {case.rows for case in prefill} == {512, 2048, 8192, 2112}
    assert {case.group.model for case in decode} == {"SmolLM2-135M", "Qwen3-0.6B", "Llama-3-8B"}
    assert {case.ranks for case in decode} == {"16", "64", "8-64", "16+64"}
    assert any(case.partial for case in decode)
    assert sum(slot < 0 for slot in Measurement(LLAMA[0], 32, base_share=0.25).slots()) == 8


def test_ranks_of_a_pool() -> None:
    mixed = Measurement(LLAMA[0], 8, "8-64")
    assert [mixed.rank_of(slot) for slot in range(5)] == [8, 16, 32, 64, 8]
    odd = Measurement(LLAMA[0], 8, "16+64")
    assert [odd.rank_of(slot) for slot in range(odd.pool())] == [16] * 8 + [64]
    assert Measurement(LLAMA[0], 8, partial=True).module_ranks(0) == (16, 0, 0)


def test_a_model_of_8b_and_its_adapters_have_their_size() -> None:
    assert 13e9 < decode_loop.model_bytes() < 15e9
    assert round(decode_loop.adapter_bytes() / 1e6, 1) == 83.9
    assert Measurement(LLAMA[0], 1).true_bytes() == 2 * 16 * (3 * 4096 + 4096 + 1024 + 1024)
    sites = decode_loop.sites()
    assert [site.row for site in sites[1]] == [7, 10, 11, 13]
    assert sites[0][2].slices == ((0, 14336), (14336, 28672))


def test_what_is_reported() -> None:
    case = Measurement(LLAMA[0], 32)
    figures = groups.report(case, {"base": 10.0, "ours": 15.0, "sgmv": 20.0}, 3e12)
    assert figures["ratio"] == {"base": 1.0, "ours": 1.5, "sgmv": 2.0}
    assert figures["low_rank_gb_per_s"] == round(case.true_bytes() / 5e-6 / 1e9, 1)
    assert groups.report(case, {"base": 10.0, "ours": 9.9}, 3e12)["low_rank_gb_per_s"] is None
    assert summary([3.0, 1.0, 2.0]).median == 2.0


class _Gpu:
    def __init__(self, status: int) -> None:
        self.status = status
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.status)


@pytest.mark.parametrize("status", [0, 1])
def test_it_measures_only_what_passed_the_tests(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = _Gpu(status)
    loop = {
        "rows": 1,
        "distribution": "distinct",
        "adapters": 1,
        "ratio": 1.02,
        "base_ms": 5.0,
        "adapters_ms": 5.1,
    }
    engine = {**loop, "any_rank_ms": 5.4, "launched_ms": 20.5, "tokens_per_s": 196.1}
    report = {
        "gpu": "NVIDIA H100 80GB",
        "copy_gb_per_s": 3000.0,
        "decode_loop": [loop],
        "engine_loop": [engine, {"skipped": "16 GB do not fit."}],
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB")
    monkeypatch.setattr(subprocess, "run", gpu.run)
    monkeypatch.setattr(check, "measured", lambda name, seconds: iter([report]))
    monkeypatch.chdir(tmp_path)
    assert check.main([]) == status
    assert "tests/kernels/gpu/test_cuda.py" in gpu.commands[0]
    written = tmp_path / "gpu-nvidia-h100-80gb.json"
    assert written.exists() == (status == 0)
    if status == 0:
        assert json.loads(written.read_text())["gpu"] == "NVIDIA H100 80GB"
        out = capsys.readouterr().out
        assert "| 1 | 1 (distinct) | 1.02 | 5.1 | 5.0 |\n" in out
        assert "| 1 | 1 (distinct) | 1.02 | 5.1 | 5.0 | 5.4 | 20.5 | 196.1 |\n16 GB do not fit." in out


def test_every_file_of_the_check_is_there(repo_root: Path) -> None:
    assert [name for name in check.TESTS if not (repo_root / name).is_file()] == []


@pytest.fixture
def tiny_loop() -> tuple[EngineLoop, HostRows]:
    config = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 384, "max_position_embeddings": 64}
    spec = ModelSpec.from_config({**config, **heads})
    torch.manual_seed(1)  # of most draws the adapters change a token
    loop = EngineLoop(spec, torch.device("cpu"), torch.float32, rows=4, adapters=3, context=21)
    return loop, HostRows(loop.tables)


def test_the_engines_loop_on_a_tiny_base(tiny_loop: tuple[EngineLoop, HostRows]) -> None:
    loop, rows = tiny_loop
    graphs, any_rank = loop.graphs(rows, Rerun), loop.graphs(AnyRank(rows), Rerun)
    assert loop.step(graphs, [0, 1, 2]) != loop.step(graphs, [-1, -1, -1])
    assert loop.step(any_rank, [0, 1, 2]) == loop.step(graphs, [0, 1, 2])
    assert set(graphs._graphs) == {(4, 16, 0), (4, 0, 0)}
    assert set(any_rank._graphs) == {(4, 256, 0)}
    figures = compare(loop, graphs, loop.graphs(rows, Rerun), any_rank, [0, 1, 2], rounds=2)
    assert (figures["rows"], figures["adapters"], figures["context"]) == (3, 3, 21)
    names = ("base_ms", "adapters_ms", "launched_ms", "any_rank_ms", "ratio", "tokens_per_s")
    assert all(figures[name] > 0 for name in names)


def test_mixed_steps_on_a_tiny_base(tiny_loop: tuple[EngineLoop, HostRows]) -> None:
    loop, rows = tiny_loop
    (found,) = mixed_loop.run(loop, rows, steps=((16, 3), (64, 4)))
    assert (found["chunk"], found["rows"]) == (16, 3), "what the cache does not hold is left out"
    assert found["ratio"] > 0


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_pass_on_a_tiny_base(tiny_loop: tuple[EngineLoop, HostRows], weights: torch.dtype) -> None:
    figures = training_pass.measure(tiny_loop[0].decoder, 64, weights, rounds=1, row=16)
    assert figures["weights"] == str(weights).removeprefix("torch.")
    assert figures["tokens_per_s"] > 0


@pytest.mark.full
def test_streams_and_a_profile_on_a_tiny_base(tiny_loop: tuple[EngineLoop, HostRows], tmp_path: Path) -> None:
    settings = Settings(kv_cache_bytes=2**22, adapter_pool_bytes=2**20, max_adapters=2, threads=1)
    engine = Engine(tiny_loop[0].decoder, settings)
    sizes = {"streams": 3, "prompt": 5, "answer": 4}
    report = stream_loop.run(engine, tmp_path, seconds=1.0, **sizes)
    assert report["settings"] == engine.ready.memory
    for name in ("alone", "swapping", "beside_a_job"):
        assert report[name]["failed"] == 0
        assert report[name]["tokens_per_s"] > 0
    assert report["swapping"]["loads"] > 0
    assert report["beside_a_job"]["trained_tokens"] >= 0
    assert engine.trainer.active == 1
    assert any("aten::" in line for line in service.profile(engine, 0.2, **sizes))
    engine.shutdown()


def test_what_the_service_does_comes_first_and_is_written_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "prepare", lambda: "16 GB do not fit.")
    assert list(service.items()) == [("engine_loop", [{"skipped": "16 GB do not fit."}])]


def test_the_engines_loop_has_the_shape_of_8b() -> None:
    spec = llama_8b()
    assert (spec.head_dim, spec.q_size, spec.kv_size) == (128, 4096, 1024)
    adapted = sum(2 * 16 * (target.in_features + target.out_features) for target in target_modules(spec))
    assert adapted == decode_loop.adapter_bytes()
