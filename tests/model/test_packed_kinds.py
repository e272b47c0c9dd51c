"""Adapters of every kind in one batch: on packed weights as on modules, and each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenora.model.executors.compiled_cpu import CompiledExecutor
from tenora.model.executors.modules import ModulesExecutor
from tenora.model.loading import load_decoder
from tenora.model.spec import table_rows
from tenora_kernels.cpu.lowrank.lowrank import ITEM_ROWS
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraTables, build_segments
from tests.model.kinds_of_adapters import KINDS, tables_of
from tests.model.step_stream import Stream

# A sequence of the base, one of each kind, and a second one of some; slots and sequences are in different orders.
SLOTS = [4, 0, -1, 6, 1, 3, 7, 2, 5, 0, 3]
LENGTH = 2 * ITEM_ROWS + 5
EVERY = range(len(SLOTS))
STEPS = [dict.fromkeys(EVERY, LENGTH - 3), *[dict.fromkeys(EVERY, 1)] * 2, dict.fromkeys((0, 4, 7), 1)]
PLAIN = [row for row in EVERY if SLOTS[row] in (-1, 0)]


@pytest.fixture(name="family", params=["smollm2", "qwen2"])
def _family(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    """qwen2 has biases."""
    return tiny(request.param)


def test_every_kind_on_packed_weights_equals_that_on_modules(family: Path) -> None:
    packed, modules = load_decoder(family, team=Team(2)), load_decoder(family)
    tables = tables_of(table_rows(packed.spec), list(KINDS.values()))
    streams = [Stream(decoder, tables, SLOTS, LENGTH) for decoder in (packed, modules)]
    assert [type(stream.executor) for stream in streams] == [CompiledExecutor, ModulesExecutor]
    ours, theirs = (stream.run(*STEPS) for stream in streams)
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert float((one - other).abs().max()) <= 2e-5 * float(other.abs().max()), row


def test_a_row_of_any_kind_has_the_same_bits_alone_and_in_a_batch_of_all(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    tables = tables_of(table_rows(decoder.spec), list(KINDS.values()))
    whole = Stream(decoder, tables, SLOTS, LENGTH).run(*STEPS[:3])
    for row in EVERY:
        alone = Stream(decoder, tables, SLOTS, LENGTH).run({row: 7}, {row: 1}, {row: LENGTH - 10}, {row: 1})
        assert torch.equal(alone[row], whole[row]), row


def test_one_member_or_several_give_every_kind_the_same_bits(family: Path) -> None:
    results = []
    for size in (1, 3):
        decoder = load_decoder(family, team=Team(size))
        tables = tables_of(table_rows(decoder.spec), list(KINDS.values()))
        results.append(Stream(decoder, tables, SLOTS, LENGTH).run(*STEPS))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rows_of_the_base_and_of_lora_keep_their_bits_beside_bottlenecks_and_scales(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    rows = table_rows(decoder.spec)
    mixed = Stream(decoder, tables_of(rows, list(KINDS.values())), SLOTS, LENGTH).run(*STEPS[:2])
    one = tables_of(rows, [KINDS["lora"]])
    alone = Stream(decoder, one, [min(slot, 0) for slot in SLOTS], LENGTH)
    plain = alone.run(*({row: count[row] for row in PLAIN} for count in STEPS[:2]))
    assert all(torch.equal(mixed[row], plain[row]) for row in PLAIN)
    assert len(PLAIN) == 3


def test_each_kind_changes_what_its_row_says(family: Path) -> None:
    """That the kinds of these tests do something: a kind that does nothing would pass all the others."""
    decoder = load_decoder(family, team=Team(2))
    tables = tables_of(table_rows(decoder.spec), list(KINDS.values()))
    mixed = Stream(decoder, tables, SLOTS, LENGTH).run(STEPS[0])
    plain = Stream(decoder, tables, [-1] * len(SLOTS), LENGTH).run(STEPS[0])
    for row, slot in enumerate(SLOTS):
        far = float((mixed[row] - plain[row]).abs().max()) > 1e-2 * float(plain[row].abs().max())
        assert far == (slot >= 0), row


def test_rows_are_ordered_base_first_and_those_with_an_epilogue_last(tiny: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(1))
    tables = tables_of(table_rows(decoder.spec), [KINDS["ia3"], KINDS["lora"], KINDS["houlsby"], KINDS["lora"]])
    slots = [2, 3, -1, 0, 1, 3, -1]
    assert [slots[place] for place in tables.order(slots)] == [-1, -1, 1, 3, 3, 0, 2]
    assert tables.order(slots).tolist()[:2] == [2, 6]  # rows of a slot keep their order


def test_a_batch_in_another_order_is_refused(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(tiny("smollm2"), team=Team(1))
    tables = tables_of(table_rows(decoder.spec), [KINDS["ia3"], KINDS["lora"]])
    assert build_segments([0, 1]).seg_slot == (0, 1)
    monkeypatch.setattr(LoraTables, "order", lambda _self, slots: list(range(len(slots))))
    with pytest.raises(ValueError, match="rows must lie with those of the base first"):
        Stream(decoder, tables, [0, 1], LENGTH).step({0: 1, 1: 1})
