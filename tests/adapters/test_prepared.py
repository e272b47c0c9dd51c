"""The flat form of an adapter: layout, types, and that the reader behind it forgets nothing it must check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenora.adapters.peft_format import WEIGHTS_NAME, AdapterReader
from tenora.adapters.prepared import prepare
from tenora.adapters.safetensors_file import write_file
from tenora.adapters.weights import AdapterWeights
from tenora.errors import AdapterFormatError
from tests.adapters import files
from tests.adapters.weights import ROWS, TARGETS, adapter, prepared

CPU = torch.device("cpu")


def wanted(weights: AdapterWeights) -> torch.Tensor:
    """A, then B transposed, row by row, in float32."""
    pieces = []
    for target in TARGETS:
        if (module := weights.modules.get(target.path)) is not None:
            for matrix in (module.a, module.b.T):
                flat = torch.from_numpy(np.ascontiguousarray(matrix)).flatten()
                pieces.append((flat.view(torch.bfloat16) if module.dtype == "bfloat16" else flat).float())
    return torch.cat(pieces)


@given(
    ranks=st.tuples(*[st.integers(0, 5)] * 3).filter(any),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    arena=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_layout_is_that_of_the_arena(ranks: tuple[int, int, int], dtype: str, arena: torch.dtype) -> None:
    weights = adapter(ranks, 3, dtype)
    flat = prepared(weights, arena)
    assert flat.ranks == ranks
    assert [scale > 0 for scale in flat.scaling] == [rank > 0 for rank in ranks]
    kept = dtype == "bfloat16" and arena == torch.float32
    assert flat.values.dtype == (torch.bfloat16 if kept else arena)
    assert torch.equal(flat.values.float(), wanted(weights).to(arena).float())


def test_modules_of_different_types_meet_in_float32() -> None:
    weights, other = adapter((2, 1, 1), 1, "bfloat16"), adapter((2, 1, 1), 2)
    path = TARGETS[1].path
    mixed = replace(weights, modules={**weights.modules, path: other.modules[path]})
    flat = prepared(mixed)
    assert flat.values.dtype == torch.float32
    assert torch.equal(flat.values, wanted(mixed))


@pytest.mark.parametrize(("arena", "value"), [(torch.float16, 1e30), (torch.bfloat16, 3.4e38)])
def test_values_that_the_type_of_the_arena_cannot_hold(arena: torch.dtype, value: float) -> None:
    weights = adapter((1, 1, 1))
    weights.modules[TARGETS[0].path].a[0, 0] = value
    with pytest.raises(AdapterFormatError, match=r"beyond b?float16"):
        prepared(weights, arena)
    assert prepared(weights).values[0] == torch.tensor(value)


def test_adapters_of_another_base_are_not_half_applied() -> None:
    weights = adapter((1, 1, 1))
    module = weights.modules[TARGETS[0].path]
    foreign = AdapterWeights({**weights.modules, "model.layers.1.self_attn.q_proj": module}, 1, (), {}, 0)
    with pytest.raises(AdapterFormatError, match="another base"):
        prepare(foreign, ROWS, dtype=torch.float32, device=CPU)


def test_a_remembered_header_still_reads_and_checks_every_value(tmp_path: Path) -> None:
    reader = AdapterReader(files.ROWS, max_rank=8)
    for seed in range(3):
        directory = files.save(tmp_path / str(seed), files.config(), files.tensors(seed=seed))
        for path, module in reader.read(directory).modules.items():
            np.testing.assert_array_equal(
                module.a, files.tensors(seed=seed)[f"{files.PREFIX}{path}.lora_A.weight"], strict=True
            )
    assert len(reader._layouts) == 1
    broken = files.tensors(seed=9)
    name = next(iter(broken))
    broken[name][0, 0] = np.nan
    files.save(tmp_path / "nan", files.config(), broken)
    with pytest.raises(AdapterFormatError, match=f"{name} holds NaN"):
        reader.read(tmp_path / "nan")
    cut = tmp_path / "0" / WEIGHTS_NAME
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(AdapterFormatError, match="truncated"):
        reader.read(tmp_path / "0")


def test_another_configuration_over_the_same_header_is_looked_at_anew(tmp_path: Path) -> None:
    reader = AdapterReader(files.ROWS, max_rank=8)
    one = reader.read(files.save(tmp_path / "a", files.config(), files.tensors()))
    two = reader.read(files.save(tmp_path / "b", files.config(lora_alpha=4), files.tensors()))
    scalings = [next(iter(weights.modules.values())).scaling for weights in (one, two)]
    assert scalings == [2.0, 1.0]
    files.save(tmp_path / "c", files.config(use_dora=True), files.tensors())
    with pytest.raises(AdapterFormatError, match="use_dora"):
        reader.read(tmp_path / "c")


def test_few_headers_are_remembered(tmp_path: Path) -> None:
    reader = AdapterReader(files.ROWS, max_rank=64)
    for rank in range(1, 20):
        reader.read(files.save(tmp_path / str(rank), files.config(r=rank), files.tensors(rank=rank)))
    assert len(reader._layouts) == 8


def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    """640, 896 and 1152 bytes begin like pickles of the protocols 2, 3 and 4."""
    files.save(tmp_path, files.config(target_modules=["q_proj"], layers_to_transform=[0]), {})
    tensors = files.tensors(("q_proj",), layers=(0,))
    write_file(tmp_path / WEIGHTS_NAME, tensors)
    content = (tmp_path / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(content[:8], "little")
    for wanted_length in (640, 896, 1152):
        padded = content[8 : 8 + length].ljust(wanted_length) + content[8 + length :]
        (tmp_path / WEIGHTS_NAME).write_bytes(wanted_length.to_bytes(8, "little") + padded)
        assert AdapterReader(files.ROWS, max_rank=8).read(tmp_path).rank == 4
