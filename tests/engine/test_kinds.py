"""Adapters of every kind in one batch of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.ref import AdapterRef
from tenora.adapters.table_rows import TableRows
from tenora.engine.messages import Generate
from tenora.model.executors.compiled_cpu import CompiledExecutor
from tenora.model.loading import load_decoder
from tenora_kernels.cpu.runtime.team import Team
from tests.engine.driver import Driver, MakeDriver
from tests.engine.requests import generate, prompt, sampling
from tests.model.kinds_of_adapters import KINDS, Kind, tables_of

NAMES = ["pfeiffer", "lora", "ia3", "dora", "parallel", "all at once", "houlsby"]  # in the order of their slots


def prepared(rows: TableRows, kind: Kind) -> PreparedAdapter:
    """A random adapter."""
    tables, ranks, first = tables_of(rows, [kind]), kind.ranks(rows), 3
    values = tables.arena[first : first + tables.numel(ranks, is_bf16=kind.is_bf16)]
    if kind.is_bf16:
        values = values.view(torch.bfloat16)[: tables.numel(ranks)]
    return PreparedAdapter(values, tuple(ranks), tuple(tables.scaling[:, 0].tolist()), int(tables.flags[0]))


@pytest.fixture
def filled(tiny_base: Path, driver: MakeDriver) -> Driver:
    """An engine on packed weights with an adapter of each kind."""
    made = driver(load_decoder(tiny_base, team=Team(2)), adapter_pool_bytes=2**21)
    for name in NAMES:
        made.engine.pool.insert(name, prepared(made.engine.rows, KINDS[name]))
    assert isinstance(made.engine.runner.executor, CompiledExecutor)
    return made


def requests(names: Sequence[str]) -> list[Generate]:
    """One of the base, two of each adapter."""
    refs = [None, *(AdapterRef(name, "") for name in names), *(AdapterRef(name, "") for name in names)]
    return [
        generate(prompt(5 + 3 * (seed % 4), seed), sampling(max_tokens=6, logprobs=0), adapter=ref)
        for seed, ref in enumerate(refs)
    ]


def test_requests_of_all_kinds_in_one_batch_are_answered_as_each_alone(filled: Driver) -> None:
    together = filled.run(*requests(NAMES))
    assert all(answer.failure is None for answer in together)
    for request, answer in zip(requests(NAMES), together, strict=True):
        (alone,) = filled.run(request)
        assert alone.tokens == answer.tokens
        assert [one.logprob for one in alone.logprobs] == [one.logprob for one in answer.logprobs]
