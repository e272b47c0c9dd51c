"""The choices of the GPU backend that need no device."""

from __future__ import annotations

import pytest
import torch

from tenora_kernels.gpu import configs
from tenora_kernels.gpu.expand_kernels import MAX_PLANES

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
    assert configs.lone_inputs(dtype) == inputs
    assert configs.lone_columns(dtype, 16) == columns
    for bucket, columns_of_y, align in ((16, 64, 16), (32, 2048, 16), (32, 2048, 1)):
        tiles = configs.decode_tiles(bucket, columns_of_y, dtype, align)
        assert configs.lone_columns(dtype, align) % tiles.bn == 0


def test_few_tiles_get_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_processors", lambda device: 132)
    assert [configs.helpers(programs, 8, H100) for programs in (4, 32, 100, 896)] == [8, 8, 2, 1]


def test_a_gemm_of_ours_is_used_only_where_it_pays() -> None:
    assert [configs.gemm_pays(arch) for arch in ("sm80", "sm90", "sm100", "gfx942")] == [True, False, False, True]


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
