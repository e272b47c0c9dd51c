"""The choices of the GPU backend that need no device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenora_kernels.gpu import backend, configs
from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.gpu.expand_kernels import MAX_PLANES
from tenora_kernels.layout import LoraTables
from tests.kernels.cases import make_tables
from tests.kernels.gpu.launches import LLAMA_8B, Launch, recording

H100 = torch.device("cuda")


def test_programs_of_expand_take_more_blocks_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_processors", lambda device: 132)
    assert [configs.blocks_per_program(blocks, H100) for blocks in (1, 800, 1600, 100_000)] == [1, 1, 2, 8]


@pytest.mark.parametrize(("rank", "bucket"), [(1, 16), (16, 16), (17, 32), (32, 32), (64, 32), (256, 32)])
def test_rank_buckets(rank: int, bucket: int) -> None:
    assert configs.rank_bucket(rank) == bucket


@pytest.mark.parametrize(
    ("k_size", "small", "large"),
    [(1, 1, 1), (576, 1, 1), (2048, 4, 2), (4096, 8, 4), (14336, 14, 4), (100_000, 15, 4)],
)
def test_splits_depend_on_the_inputs_only(k_size: int, small: int, large: int) -> None:
    assert configs.splits_of(k_size, small=True) == small
    assert configs.splits_of(k_size, small=False) == large
    assert small <= MAX_PLANES.value


@pytest.mark.parametrize(
    ("dtype", "inputs", "columns"), [(torch.bfloat16, 512, 1024), (torch.float16, 512, 1024), (torch.float32, 256, 512)]
)
def test_a_row_that_is_alone_takes_whole_blocks(dtype: torch.dtype, inputs: int, columns: int) -> None:
    assert configs.single_row_inputs(dtype) == inputs
    assert configs.single_row_columns(dtype, 16) == columns
    for bucket, columns_of_y, align in ((16, 64, 16), (32, 2048, 16), (32, 2048, 1)):
        tiles = configs.decode_tiles(bucket, columns_of_y, dtype, align)
        assert configs.single_row_columns(dtype, align) % tiles.bn == 0


def test_few_tiles_get_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_processors", lambda device: 132)
    assert [configs.helpers(programs, 8, H100) for programs in (4, 32, 100, 896)] == [8, 8, 2, 1]


def test_terms_keep_the_bits_that_the_result_has() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert [configs.term_count(bf16, out) for out in (bf16, fp16, fp32)] == [2, 2, 3]
    assert configs.term_count(fp16, fp32) == 3
    assert configs.term_count(fp32, bf16) == 0
    assert configs.widest(bf16, fp16) == fp16
    assert configs.widest(bf16, fp32) == fp32
    assert configs.widest(bf16, bf16) == bf16


@pytest.mark.parametrize(
    ("most", "rows", "programs"), [(1, 8, 1), (32, 8, 32), (32, 512, 16), (32, 100_000, 4), (2, 100_000, 2)]
)
def test_programs_that_share_a_row(most: int, rows: int, programs: int) -> None:
    assert configs.programs_per_row(most, rows) == programs


def test_tiles_of_paged_attention_hold_the_group_and_the_head() -> None:
    assert configs.paged_tiles(4, 128, torch.bfloat16, "sm90") == configs.Tiles(16, 0, 64, 128, warps=4, stages=5)
    assert configs.paged_tiles(17, 80, torch.float16, "sm80") == configs.Tiles(32, 0, 32, 128, warps=4, stages=5)
    assert configs.paged_tiles(1, 256, torch.float32, "gfx942") == configs.Tiles(16, 0, 16, 256, warps=4, stages=2)


def test_rank_bounds() -> None:
    assert [configs.rank_bounds(rank) for rank in (8, 16, 17, 256)] == [(8,), (16,), (16, 17), (16, 256)]


def decode_launches(pool_rank: int, step_rank: int | None, rows: int) -> list[Launch]:
    """What a step of Llama-3-8B's q, k and v launches, for a pool of adapters of up to `pool_rank`."""
    arena = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    tables = LoraTables.empty(arena, in_features=LLAMA_8B.inputs, out_features=LLAMA_8B.outputs, slots=64)
    x, y = (torch.empty(rows, width, dtype=torch.bfloat16, device="meta") for width in (4096, 6144))
    with recording("step", "sm90") as log:
        lora = GpuLora(tables, max_rows=rows, max_rank=pool_rank)
        batch = lora.batch(torch.empty(rows, dtype=torch.int32, device="meta"), max_rank=step_rank)
        backend.forward(y, x, LLAMA_8B.sites()["qkv"], batch)
    return log


@pytest.mark.parametrize("rows", [32, 2048])
def test_a_pool_that_takes_rank_256_launches_for_rank_16_what_a_pool_of_rank_16_does(rows: int) -> None:
    """`max_lora_rank` is 256 by default; with it everybody had the kernels of several passes."""
    usual, bounded, deep = (
        decode_launches(16, None, rows),
        decode_launches(256, 16, rows),
        decode_launches(256, None, rows),
    )
    assert [(launch.name, launch.constants) for launch in bounded] == [(u.name, u.constants) for u in usual]
    assert [launch.constants for launch in deep] != [launch.constants for launch in usual]


def test_a_group_of_projections_is_two_launches_beside_its_gemm_and_a_step_is_grouped_by_two() -> None:
    assert [launch.name for launch in decode_launches(16, None, 32)] == ["sort_rows", "find_tiles", "shrink", "expand"]


def test_the_bound_is_that_of_the_rows_and_not_of_the_pool() -> None:
    tables = make_tables([[4] * 7, [16] * 7, [33] * 7], torch.float32)
    lora = GpuLora(tables, max_rows=4, max_rank=64, align=1)
    assert lora.bounds == (16, 64)
    for slots, bound in (([-1, -1], 0), ([0, -1, 1], 16), ([0, 2], 64), ([], 0)):
        assert lora.bound(np.array(slots, dtype=np.int64)) == bound
    tables.clear(2)
    assert lora.bound(np.array([0, 2])) == 16
