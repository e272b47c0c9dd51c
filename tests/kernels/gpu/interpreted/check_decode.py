"""An engine whose decode steps run all the GPU's kernels in Triton's interpreter: tokens are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tenora.adapters.ref import AdapterRef
from tenora.model import attention, cache, pages
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.executors.decode_graphs import DecodeGraphs
from tenora.model.loading import load_decoder
from tenora_kernels import ops
from tenora_kernels.gpu import backend, paged
from tenora_kernels.gpu.context import GpuLora
from tests.engine.driver import Driver, make_adapter, peft_warnings, ref_of
from tests.engine.graphs import Rerun
from tests.engine.requests import generate, prompt, sampling
from tests.model.served import save_random
from tests.support.full import full_but


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Driver]]:
    """`gpu(directory)`: an engine as on a GPU, but for the graphs, which do their work again."""
    made: list[Driver] = []

    def make(directory: Path, **settings: Any) -> Driver:
        monkeypatch.setattr(cache, "supports", lambda *given: False)  # blocks as they lie on a gpu
        monkeypatch.setattr(attention, "GatheredAttention", pages.SplitAttention)
        monkeypatch.setattr(pages, "_kernels_for", lambda device: paged)
        monkeypatch.setattr(ops, "select_backend", lambda *given: backend)
        made.append(Driver(load_decoder(directory), **settings))
        engine, runner = made[-1].engine, made[-1].engine.runner
        lora = GpuLora(engine.pool.tables, max_rows=64, max_rank=16)
        graphs = DecodeGraphs(runner.decoder, runner.cache, lora, Rerun, max_rows=4, max_context=64)
        runner.executor = GraphExecutor(runner.decoder, runner.cache, graphs)
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    directory = tmp_path_factory.mktemp("adapters")
    targets = (("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    return [
        make_adapter(tiny_base, directory / f"a{index}", rank=rank, targets=targets[index], seed=index)
        for index, rank in enumerate((3, 16))
    ]


@pytest.mark.parametrize("family", full_but("smollm2", ["smollm2", "llama", "mistral", "qwen3", "dynamic_rope"]))
def test_every_family(family: str, make_tiny: Callable[[str], Path], gpu: Callable[..., Driver]) -> None:
    """Two of three rows decode while the third one's chunk comes in; one row in four is padding."""
    directory = make_tiny(family)
    requests = [generate(prompt(length, length), sampling(max_tokens=3)) for length in (3, 7, 15)]
    plain = Driver(load_decoder(directory), max_num_batched_tokens=16)
    wanted = [answer.tokens for answer in plain.run(*requests)]
    plain.close()
    assert [answer.tokens for answer in gpu(directory, max_num_batched_tokens=16).run(*requests)] == wanted


@pytest.mark.full
def test_adapters(tiny_base: Path, adapters: list[AdapterRef], gpu: Callable[..., Driver]) -> None:
    """They are read after the first steps, and one slot is for both of them."""
    requests = [
        generate(prompt(4, index), sampling(max_tokens=4 - index), adapter=kind)
        for index, kind in enumerate((None, *adapters))
    ]
    plain = Driver(load_decoder(tiny_base), max_adapters=1)
    wanted = [answer.tokens for answer in plain.run(*requests)]
    bare = [plain.tokens(request.token_ids, request.sampling) for request in requests[1:]]
    plain.close()
    assert bare != wanted[1:], "the adapters change nothing, so this shows nothing"
    tiny = gpu(tiny_base, max_adapters=1)
    assert [answer.tokens for answer in tiny.run(*requests)] == wanted
    assert tiny.engine.stats().adapter_evictions == 1


@pytest.mark.full
def test_rows_with_scales_decode_beside_lora_rows(
    tiny_base: Path, adapters: list[AdapterRef], gpu: Callable[..., Driver], tmp_path: Path
) -> None:
    """(IA)³, a LoRA adapter and the base in one batch, its prompts and its decode steps, as on the CPU."""
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    with peft_warnings():
        save_random(tiny_base, config, tmp_path / "ia3", lambda name: "ia3_" in name)
    kinds = (ref_of(tmp_path / "ia3"), adapters[0], None)
    requests = [generate(prompt(5, n), sampling(max_tokens=3), adapter=kind) for n, kind in enumerate(kinds)]
    plain = Driver(load_decoder(tiny_base))
    wanted = [answer.tokens for answer in plain.run(*requests)]
    bare = plain.tokens(requests[0].token_ids, requests[0].sampling)
    plain.close()
    assert bare != wanted[0], "the scales change nothing, so this shows nothing"
    assert [answer.tokens for answer in gpu(tiny_base).run(*requests)] == wanted


def test_the_blocks_of_a_gpu_are_whole(tiny_base: Path, gpu: Callable[..., Driver]) -> None:
    runner = gpu(tiny_base).engine.runner
    assert all(part.is_contiguous() for part in (*runner.cache.k, *runner.cache.v))
    assert runner.decoder.dtype == torch.float32
