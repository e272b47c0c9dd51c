"""The choices of the GPU backend that need no device."""

from __future__ import annotations

import pytest
import torch

from tenora_kernels.gpu import configs

H100 = torch.device("cuda")


def test_one_launch_while_its_programs_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm90")
    monkeypatch.setattr(configs, "_processors", lambda device: 132)
    assert configs.grid_of_one_launch(60, H100) == 60
    assert configs.grid_of_one_launch(32 * (2 * 4 + 2 * 112), H100) == 4 * 132, "gate and up of 8B, 32 adapters"
    assert configs.grid_of_one_launch(256 * (2 * 4 + 2 * 112), H100) is None


@pytest.mark.parametrize(("rank", "bucket"), [(1, 16), (16, 16), (17, 32), (32, 32), (64, 32), (256, 32)])
def test_rank_buckets(rank: int, bucket: int) -> None:
    assert configs.rank_bucket(rank) == bucket


@pytest.mark.parametrize(("k_size", "splits"), [(1, 1), (576, 1), (2048, 2), (4096, 4), (14336, 8), (100_000, 8)])
def test_splits_depend_on_the_inputs_only(k_size: int, splits: int) -> None:
    assert configs.splits_of(k_size) == splits


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
