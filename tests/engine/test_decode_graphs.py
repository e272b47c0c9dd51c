"""Decode steps through graphs give what eager steps give, and padding is not seen. `Rerun` stands for a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tenora.adapters.ref import AdapterRef
from tenora.model.executors.base import Batch
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.executors.modules import ModulesExecutor
from tenora.model.loading import load_decoder
from tests.engine.driver import Answer, Driver, MakeDriver, make_adapter
from tests.engine.graphs import HostRows, Rerun, with_graphs
from tests.engine.requests import generate, prompt, sampling
from tests.support.tiny import build_tiny


class Counted(Rerun):
    """Counts captures and replays, and remembers the rows of each."""

    captured: list[int]
    replayed: list[int]

    def __init__(self, work: Callable[[], Tensor]) -> None:
        super().__init__(work)
        self.captured.append(len(self.output))

    def replay(self) -> None:
        super().replay()
        self.replayed.append(len(self.output))


@pytest.fixture
def counted() -> type[Counted]:
    class Fresh(Counted):
        captured: list[int] = []  # noqa: RUF012  # of this test alone
        replayed: list[int] = []  # noqa: RUF012

    return Fresh


def both(make: MakeDriver, *requests: Any, **settings: Any) -> tuple[list[Answer], list[Answer], Driver]:
    """The answers of an eager engine and of one with graphs, and the latter."""
    eager, graphed = make(**settings), make(**settings)
    with_graphs(graphed.engine).warm_up()
    return eager.run(*requests), graphed.run(*requests), graphed


@pytest.mark.parametrize(
    "family", ["smollm2", "llama", "mistral", "qwen2", "qwen3", "dynamic_rope", "llama3_rope", "yarn_rope"]
)
def test_every_family(family: str, make_tiny: Callable[[str], Path], driver: MakeDriver) -> None:
    """Prompts of many lengths, one beyond what a dynamic rope was made for; three of eight rows are padding."""
    base = load_decoder(make_tiny(family))
    lengths = (1, 3, 4, 17, 50)
    requests = [generate(prompt(length, length), sampling(max_tokens=20)) for length in lengths]
    eager, graphed, _ = both(driver, *requests, base=base)
    assert [answer.tokens for answer in graphed] == [answer.tokens for answer in eager]
    assert len({tuple(answer.tokens) for answer in eager}) == len(lengths)


def test_a_rope_of_two_lengths(tmp_path: Path, driver: MakeDriver) -> None:
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 8.0}
    base = load_decoder(build_tiny(tmp_path, "llama", rope_parameters={**rope, **factors}))
    requests = [generate(prompt(length, length), sampling(max_tokens=12)) for length in (40, 60, 80)]
    eager, graphed, _ = both(driver, *requests, base=base)
    assert [answer.tokens for answer in graphed] == [answer.tokens for answer in eager]


def test_adapters_that_came_after_the_capture(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    """Nine kinds of rows that join and leave, adapters that are evicted and loaded again, chunks in between."""
    kinds = [None, *adapters]
    requests = [
        generate(
            prompt(3 + 2 * (index % 7), index),
            sampling(max_tokens=6 + index % 9, logprobs=2, temperature=0.9 * (index % 2), seed=index),
            adapter=kinds[index % 9],
        )
        for index in range(24)
    ]
    settings = {"max_adapters": 3, "max_num_seqs": 7, "max_num_batched_tokens": 24}
    eager, graphed, tiny = both(driver, *requests, **settings)
    for one, other in zip(eager, graphed, strict=True):
        assert other.failure is None
        assert other.tokens == one.tokens
        assert [entry.logprob for entry in other.logprobs] == pytest.approx(
            [entry.logprob for entry in one.logprobs], abs=1e-4
        )
    assert tiny.engine.stats().adapter_evictions > 3


def test_steps_are_padded_to_the_next_size(driver: MakeDriver, counted: type[Counted]) -> None:
    tiny = driver(max_num_seqs=6)
    graphs = with_graphs(tiny.engine, capture=counted)
    assert graphs.sizes == (1, 2, 4, 6)
    graphs.warm_up()
    assert counted.captured == [6] * 3 + [4] * 3 + [2] * 3 + [1] * 3, (
        "the largest first: any rank, usual ones, no adapter"
    )
    tiny.run(*(generate(prompt(4, seed), sampling(max_tokens=3 + seed)) for seed in range(5)))
    # The first step is a prompt's; then 5 rows decode twice, and each step after it one row less.
    assert counted.replayed == [6, 6, 4, 4, 2, 1]
    assert len(counted.captured) == 12


def test_only_rows_with_adapters_pay_for_them(
    driver: MakeDriver, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = driver()
    with_graphs(tiny.engine).warm_up()
    grouped: list[list[int]] = []
    batch = HostRows.batch

    def grouping(self: HostRows, slots: Tensor, **given: Any) -> Any:
        grouped.append(slots.tolist())
        return batch(self, slots, **given)

    monkeypatch.setattr(HostRows, "batch", grouping)
    tiny.run(generate([5], sampling(max_tokens=3)), generate([6], sampling(max_tokens=3)))
    assert grouped == []
    tiny.run(*(generate([5, seed], sampling(max_tokens=3), adapter=adapters[0]) for seed in (3, 4, 5)))
    assert grouped[-1] == [0, 0, 0, -1], "padding is a row of the base"


def test_an_adapter_of_high_rank_costs_only_the_steps_that_it_takes_part_in(
    driver: MakeDriver, adapters: list[AdapterRef], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be resident, pinned even, and the pool may take rank 256: rows of rank 16 run as if it were not there."""
    wide = make_adapter(tiny_base, tmp_path / "wide", rank=33)
    tiny, plain = driver(max_lora_rank=256), driver(max_lora_rank=256)
    bounds: list[int] = []
    graphs = with_graphs(tiny.engine)
    graphs.warm_up()
    assert graphs.lora.bounds == (16, 256)
    pick = graphs._graph

    def picked(rows: int, max_rank: int, flags: int) -> Any:
        bounds.append(max_rank)
        return pick(rows, max_rank, flags)

    monkeypatch.setattr(graphs, "_graph", picked)
    params = sampling(max_tokens=4)

    def run(*adapters: AdapterRef | None) -> set[int]:
        bounds.clear()
        requests = [generate([5, number], params, adapter=adapter) for number, adapter in enumerate(adapters)]
        wanted = [plain.tokens(request.token_ids, params, request.adapter) for request in requests]
        assert [answer.tokens for answer in tiny.run(*requests)] == wanted
        return set(bounds) - {0}  # rows of the base may run ahead of those whose adapter is being read

    assert run(adapters[0], None) == {16}
    assert run(wide, None) == {256}
    assert wide.digest in tiny.engine.stats().adapters_resident
    assert run(adapters[0], adapters[1]) == {16}, "its neighbour is resident, and not in the batch"
    assert 256 in run(adapters[0], wide)
    assert run(None) == set()
    assert set(bounds) == {0}


def test_padding_changes_no_block(driver: MakeDriver) -> None:
    """Blocks that no sequence holds are NaN before and after; a row that read one would be NaN, too."""
    tiny = driver(max_num_seqs=4)
    graphs = with_graphs(tiny.engine)
    cache = tiny.engine.runner.cache
    for part in (*cache.k, *cache.v):
        part.fill_(float("nan"))
    graphs.warm_up()
    assert all(part.isnan().all() for part in (*cache.k, *cache.v))
    answers = tiny.run(*(generate(prompt(6, seed), sampling(max_tokens=9)) for seed in range(3)))
    assert all(answer.failure is None and -1 not in answer.tokens for answer in answers)
    written = {int((~part[:, :, 0, 0].isnan()).sum()) for part in (*cache.k, *cache.v)}
    assert written == {3 * (6 + 9 - 1)}, "every token but the last one of each sequence, once"


def test_what_a_graph_reads(driver: MakeDriver) -> None:
    graphs = with_graphs(driver(max_num_seqs=4, max_model_len=20).engine)
    numbers = np.array([5, 6, 7])
    graphs.run(Batch([1, 2, 3], numbers, numbers + 10, numbers - 8, numbers[:, None] * [1, 2], None))
    inputs = graphs._inputs(4)
    assert [field.tolist() for field in inputs[:5]] == [
        [1, 2, 3, 0],
        [5, 6, 7, 0],
        [15, 16, 17, -1],
        [6, 7, 8, 0],
        [-3, -2, -1, -1],
    ]
    assert inputs.block_tables.shape == (4, 5)
    assert inputs.block_tables[:, :2].tolist() == [[5, 10], [6, 12], [7, 14], [0, 0]]
    for field in inputs:
        assert field.data_ptr() % 16 == graphs._buffer.data_ptr() % 16, "kernels are compiled for whole 16 bytes"


def test_what_an_earlier_step_left_in_the_buffer_is_not_read(driver: MakeDriver) -> None:
    """Other sizes lay their fields out elsewhere; a long sequence leaves its table behind."""
    tiny, eager = driver(), driver()
    with_graphs(tiny.engine)
    for lengths in ((60, 3), (2,), (5, 4, 3, 2, 1), (1,), (9, 8)):
        requests = [generate(prompt(length, length), sampling(max_tokens=7)) for length in lengths]
        got, wanted = tiny.run(*requests), eager.run(*requests)
        assert [answer.tokens for answer in got] == [answer.tokens for answer in wanted]


def test_prompt_logprobs_and_a_prompt_of_one_token(driver: MakeDriver) -> None:
    requests = [generate(prompt(n, n), sampling(max_tokens=4, prompt_logprobs=2)) for n in (1, 2, 9)]
    eager, graphed, _ = both(driver, *requests, max_num_batched_tokens=16)
    for one, other in zip(eager, graphed, strict=True):
        assert other.tokens == one.tokens
        told, wanted = (answer.outputs[0].prompt_logprobs or [] for answer in (other, one))
        assert len(told) == len(wanted)
        for entry, known in zip(told[1:], wanted[1:], strict=True):
            assert entry is not None
            assert known is not None
            assert entry.logprob == pytest.approx(known.logprob, abs=1e-4)


def test_a_failing_refresh_fails_its_step_alone(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    tiny = driver()
    rows = with_graphs(tiny.engine).lora
    assert isinstance(rows, HostRows)
    request = generate(prompt(5), sampling(max_tokens=8), adapter=adapters[0])
    answer = tiny.add(request)
    while not answer.outputs:
        tiny.step()
    rows.broken = True
    tiny.step()
    assert answer.failure is not None
    assert answer.failure.code == "engine_error"
    rows.broken = False
    (again,) = tiny.run(generate(request.token_ids, request.sampling, adapter=adapters[0]))
    assert again.failure is None
    assert again.tokens == driver().tokens(request.token_ids, request.sampling, adapters[0])


def test_tables_are_refreshed_between_steps(driver: MakeDriver, adapters: list[AdapterRef]) -> None:
    """Without it the rows of an adapter that came later would be those of the base."""
    tiny = driver()
    graphs = with_graphs(tiny.engine)
    graphs.warm_up()
    params = sampling(max_tokens=8)
    base = tiny.tokens([7, 8, 9], params)
    adapted = tiny.tokens([7, 8, 9], params, adapters[1])
    assert adapted == driver().tokens([7, 8, 9], params, adapters[1]) != base


def test_warming_up_leaves_no_trace(driver: MakeDriver, counted: type[Counted]) -> None:
    tiny = driver(max_num_batched_tokens=32)
    tiny.engine.runner.warm_up(32)
    assert not counted.captured, "nothing to do on a CPU"
    with_graphs(tiny.engine, capture=counted)
    tiny.engine.runner.warm_up(32)
    tiny.check_baseline()
    request = generate(prompt(9), sampling(max_tokens=6))
    assert tiny.run(request)[0].tokens == driver().run(request)[0].tokens


def test_there_are_none_on_a_cpu(driver: MakeDriver) -> None:
    assert isinstance(driver().engine.runner.executor, ModulesExecutor)


def test_a_step_that_no_graph_holds_is_an_error(driver: MakeDriver) -> None:
    tiny = driver(max_num_seqs=2)
    graphs = with_graphs(tiny.engine)
    numbers = torch.zeros(3, dtype=torch.int64).numpy()
    with pytest.raises(ValueError, match="3 rows do not fit graphs for 2"):
        graphs.run(Batch(numbers, numbers, numbers, numbers, numbers[:, None], None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "family", ["smollm2", "llama", "mistral", "qwen2", "qwen3", "dynamic_rope", "llama3_rope", "yarn_rope"]
)
def test_on_a_gpu_tokens_equal_those_of_the_cpu(
    family: str, make_tiny: Callable[[str], Path], adapters: list[AdapterRef], driver: MakeDriver
) -> None:
    """float32, so that the two differ by rounding only. The adapters are made for smollm2; others run without."""
    directory = make_tiny(family)
    kinds = [None, *adapters] if family == "smollm2" else [None]
    requests = [
        generate(prompt(3 + 5 * index, index), sampling(max_tokens=20), adapter=kinds[index % len(kinds)])
        for index in range(13)
    ]
    settings = {"max_adapters": 3, "max_num_seqs": 7, "max_num_batched_tokens": 48}
    gpu = driver(load_decoder(directory, device="cuda"), **settings)
    gpu.engine.runner.warm_up(48)
    wanted = driver(load_decoder(directory), **settings).run(*requests)
    assert [answer.tokens for answer in gpu.run(*requests)] == [answer.tokens for answer in wanted]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_before_the_tokens(
    make_tiny: Callable[[str], Path], driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps, chunks, and both in one step: the hidden states are there without a synchronisation."""
    gpu = driver(load_decoder(make_tiny("llama"), device="cuda", dtype=torch.bfloat16), max_num_batched_tokens=24)
    gpu.engine.runner.warm_up(24)
    run = GraphExecutor.run

    def strict(self: GraphExecutor, batch: Batch) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    requests = [generate(prompt(4 + 9 * index, index), sampling(max_tokens=12)) for index in range(6)]
    gpu.run(*requests)  # compiles what is left
    monkeypatch.setattr(GraphExecutor, "run", strict)
    again = [generate(request.token_ids, request.sampling, cache_salt="other") for request in requests]
    assert all(answer.failure is None for answer in gpu.run(*again))
