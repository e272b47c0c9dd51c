"""Serving on packed weights: the same numbers as the modules, and for each row the same bits in every batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenora.model.decoder import Decoder
from tenora.model.executors.compiled_cpu import CompiledExecutor
from tenora.model.executors.modules import ModulesExecutor
from tenora.model.loading import load_decoder
from tenora.model.spec import target_modules
from tenora_kernels.cpu.lowrank.lowrank import ITEM_ROWS
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.layout import LoraTables
from tests.model.step_stream import Stream

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS: list[dict[str, int]] = [
    dict.fromkeys(ALL, 16),
    {"v_proj": 3, "down_proj": 8, "up_proj": 1},
    dict.fromkeys(ALL, 33),
    {"q_proj": 64, "o_proj": 5},
    {},
]


def tables_of(decoder: Decoder, *, is_bf16: bool) -> LoraTables:
    """Random adapters of RANKS, every other one bfloat16 if `is_bf16`, with room between them."""
    modules = target_modules(decoder.spec)
    inputs, outputs = [m.in_features for m in modules], [m.out_features for m in modules]
    ranks = [[of.get(module.name, 0) for module in modules] for of in RANKS]
    tables = LoraTables.empty(torch.zeros(2**20), in_features=inputs, out_features=outputs, slots=len(ranks))
    generator, offset = torch.Generator().manual_seed(5), 3
    for slot, row in enumerate(ranks):
        as_bf16 = is_bf16 and slot % 2 == 0
        offset += tables.place(slot, offset, row, [0.5 + slot] * len(row), is_bf16=as_bf16) + 1
        for module in modules:
            for matrix in (tables.a(module.row, slot), tables.bt(module.row, slot)):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.1)
    return tables


SLOTS = [-1, 0, 1, 2, 3, 4, 0, -1]
LENGTH = 2 * ITEM_ROWS + 5


@pytest.fixture(name="family", params=["smollm2", "qwen2", "qwen3", "mistral"])
def _family(request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_adapters_on_packed_weights_equal_those_on_modules(family: Path, is_bf16: bool) -> None:
    packed, modules = load_decoder(family, team=Team(2)), load_decoder(family)
    assert packed.stack is not None
    assert modules.stack is None
    tables = tables_of(packed, is_bf16=is_bf16)
    steps = [dict.fromkeys(range(8), LENGTH - 2), dict.fromkeys(range(8), 1), dict.fromkeys((1, 3, 7), 1)]
    streams = [Stream(decoder, tables, SLOTS, LENGTH) for decoder in (packed, modules)]
    assert [type(stream.executor) for stream in streams] == [CompiledExecutor, ModulesExecutor]
    ours, theirs = (stream.run(*steps) for stream in streams)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())


def test_a_row_has_the_same_bits_alone_and_in_any_batch(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    tables = tables_of(decoder, is_bf16=True)
    whole = Stream(decoder, tables, SLOTS, LENGTH).run(
        dict.fromkeys(range(8), LENGTH - 3), *[dict.fromkeys(range(8), 1)] * 3
    )
    for row in range(8):
        alone = Stream(decoder, tables, SLOTS, LENGTH).run({row: 7}, {row: 1}, {row: LENGTH - 9}, {row: 1})
        assert torch.equal(alone[row], whole[row]), row


def test_one_member_or_several_give_the_same_bits(family: Path) -> None:
    results = []
    for size in (1, 3):
        decoder = load_decoder(family, team=Team(size))
        stream = Stream(decoder, tables_of(decoder, is_bf16=True), SLOTS, LENGTH)
        results.append(stream.run(dict.fromkeys(range(8), LENGTH)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_base_rows_are_those_of_a_batch_without_adapters(family: Path) -> None:
    decoder = load_decoder(family, team=Team(2))
    tables = tables_of(decoder, is_bf16=False)
    mixed = Stream(decoder, tables, SLOTS, LENGTH).run(dict.fromkeys(range(8), LENGTH))
    plain = Stream(decoder, tables, [-1] * 8, LENGTH).run(dict.fromkeys(range(8), LENGTH))
    for row, slot in enumerate(SLOTS):
        # Slot 4 adapts nothing.
        assert torch.equal(mixed[row], plain[row]) == (slot in (-1, 4))


def test_bfloat16_weights_stay_bfloat16_and_compute_as_float32(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint in bfloat16 takes half the memory and gives what the same weights in float32 give."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    packed, modules = load_decoder(tmp_path, team=Team(2)), load_decoder(tmp_path)
    assert packed.stack is not None
    assert packed.stack.table.is_bf16
    tables = tables_of(packed, is_bf16=True)
    steps = [dict.fromkeys(range(8), LENGTH - 1), dict.fromkeys(range(8), 1)]
    ours, theirs = (Stream(decoder, tables, SLOTS, LENGTH).run(*steps) for decoder in (packed, modules))
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())
