"""One executor is chosen for a base when it is loaded, and only a step's shape is left to be decided later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors import modules
from tenora.model.executors.base import Batch, Executor
from tenora.model.executors.choice import executor_for
from tenora.model.executors.compiled_cpu import CompiledExecutor
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.executors.decode_graphs import DecodeGraphs
from tenora.model.executors.modules import ModulesExecutor
from tenora.model.loading import load_decoder
from tenora.model.spec import target_modules
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraTables
from tests.engine.graphs import HostRows, Rerun

LIMITS: dict[str, int] = {"max_rows": 4, "max_tokens": 64, "max_context": 64, "max_rank": 16}


def tables_of(decoder: Decoder, dtype: torch.dtype) -> LoraTables:
    modules = target_modules(decoder.spec)
    inputs, outputs = [m.in_features for m in modules], [m.out_features for m in modules]
    return LoraTables.empty(torch.zeros(16, dtype=dtype), in_features=inputs, out_features=outputs, slots=2)


def chosen(decoder: Decoder, dtype: torch.dtype = torch.float32) -> Executor:
    cache = KVCache.allocate(decoder.spec, 8, 16, dtype=decoder.dtype)
    return executor_for(decoder, cache, tables_of(decoder, dtype), **LIMITS)


def test_packed_weights_are_computed_by_the_compiled_step(tiny: Callable[..., Path]) -> None:
    assert isinstance(chosen(load_decoder(tiny("smollm2"), team=Team(1))), CompiledExecutor)


@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        ({}, torch.float32),
        ({"team": Team(1), "dtype": torch.bfloat16}, torch.bfloat16),
        ({"team": Team(1)}, torch.bfloat16),
    ],
    ids=["nobody to share the work", "a base in bfloat16", "adapters in bfloat16"],
)
def test_everything_else_on_a_cpu_runs_as_modules(
    tiny: Callable[..., Path], options: dict[str, Any], adapters: torch.dtype
) -> None:
    assert isinstance(chosen(load_decoder(tiny("smollm2"), **options), adapters), ModulesExecutor)


def test_the_compiled_step_refuses_what_it_does_not_support(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(1))
    cache = KVCache.allocate(decoder.spec, 8, 16)
    with pytest.raises(ValueError, match="in float32"):
        CompiledExecutor(decoder, cache, tables_of(decoder, torch.bfloat16))


def test_only_steps_that_decode_and_fit_are_replayed(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny("smollm2"))
    cache = KVCache.allocate(decoder.spec, 8, 16)
    graphs = DecodeGraphs(
        decoder, cache, HostRows(tables_of(decoder, torch.float32)), Rerun, max_rows=2, max_context=64
    )
    executor = GraphExecutor(decoder, cache, graphs)
    ways: list[str] = []
    for kind, way in ((DecodeGraphs, "replayed"), (ModulesExecutor, "launched")):
        run = kind.run

        def noted(self: Any, batch: Batch, run: Any = run, way: str = way) -> Any:
            ways.append(way)
            return run(self, batch)

        monkeypatch.setattr(kind, "run", noted)

    def step(*counts: int) -> None:
        rows = np.arange(sum(counts))
        tables = np.arange(len(counts), dtype=np.int32)[:, None]
        sequence = np.repeat(np.arange(len(counts)), counts)
        starts = np.concatenate(([0], np.cumsum(counts)))
        positions = rows - starts[sequence]
        none = np.full(len(counts), -1)
        with torch.no_grad():
            executor.run(Batch(rows, positions, sequence * 16 + positions, none, tables, query_start=starts))

    step(1, 1)
    step(1, 1, 1)
    step(1, 3)
    assert ways == ["replayed", "launched", "launched"]


def test_a_launched_step_has_the_table_of_each_row_side_by_side(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernels want it that read pages where they lie; the engine's tables lie as a captured step reads them."""
    seen: list[torch.Tensor] = []
    real = modules.paged_attention

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(given[4])
        return real(*given, **named)

    monkeypatch.setattr(modules, "paged_attention", watched)
    numbers, tables = np.arange(2), np.array([[0, 1], [2, 3]], dtype=np.int32)
    batch = Batch(numbers, numbers, tables[:, 0] * 16 + numbers, numbers - 2, np.asfortranarray(tables))
    with torch.no_grad():
        chosen(load_decoder(tiny("smollm2"))).run(batch)
    assert [table.tolist() for table in seen] == [tables.tolist()]
    assert seen[0].is_contiguous()
