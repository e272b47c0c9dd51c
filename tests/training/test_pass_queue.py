"""Which works share a pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora.training.arena import TrainedAdapter, TrainingArena
from tenora.training.packing import pack
from tenora.training.pass_queue import Work, WorkQueue
from tenora.training.spec import LoraSpec
from tests.data.rows import random_rows
from tests.model.kinds_of_adapters import KINDS, Kind
from tests.training.test_step import CPU


@pytest.fixture(name="adapter", scope="module")
def _adapter(make_tiny: Callable[[str], Path]) -> Callable[[Kind], TrainedAdapter]:
    rows = table_rows(load_decoder(make_tiny("smollm2")).spec)
    arena = TrainingArena(rows, device=CPU)
    return lambda kind: arena.add(LoraSpec(rank=4), kind.ranks(rows))


@pytest.mark.parametrize("kind", ["dora", "ia3", "pfeiffer"])
def test_lora_shares_no_pass_with_what_compiled_layers_do_not_compute(
    adapter: Callable[[Kind], TrainedAdapter], kind: str
) -> None:
    """Beside such an adapter its rows would take the modules, and have other bits than alone."""
    queue, packed = WorkQueue(), pack(random_rows(2, seed=1), [0, 1])
    works = [
        queue.submit(Work(str(number), "one", [packed], adapter(KINDS[name])))
        for number, name in enumerate(["lora", kind, "lora", kind])
    ]
    for members in (works[::2], works[1::2]):
        chosen = queue.choose(1000)
        assert sorted(work.run_id for work in chosen) == [work.run_id for work in members]
        for work in chosen:
            work.results.append(None)  # type: ignore[arg-type]  # only counted
