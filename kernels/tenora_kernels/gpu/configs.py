"""Tiles of every kernel by rank, shape and architecture, and the one place where launches are chosen.

A table, not a search: equal arguments launch the same code on every machine of a kind, and nothing is timed at run
time. `tests/kernels/gpu` compiles every entry ahead of time for every architecture and holds it to a budget.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

Arch = Literal["sm80", "sm90", "sm100", "gfx942"]

SMALL_TILE = 16
"""Rows of a decode tile: the smallest M of the tensor cores, and what one row per adapter wastes least of."""

LARGE_TILE = 128
"""Rows of a prefill tile."""

DECODE_ROWS = 256
"""Batches up to this many rows use decode tiles: weights are then most of the bytes, rows of one adapter few."""

MAX_MODULES = 3
"""Modules of one launch (q, k, v); a site of more is launched in parts."""

_EXPAND_PROGRAMS = 6
"""Programs of `expand` per multiprocessor that one launch aims at."""

SPLIT_KEYS = 256
"""Keys of a split of paged attention. A sequence of that length takes one program per key head and no second pass."""

MAX_SPLITS = 32
"""Splits of one sequence at most; a longer one has larger splits. Scratch memory is proportional to it."""

_PAGED_PROGRAMS = 8192
"""Programs of paged attention at most, about: one that finds nothing to do still costs a few nanoseconds."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Block sizes of a kernel: rows bm, ranks rb, columns bn, inputs bk; 0 where the kernel has no such loop."""

    bm: int
    rb: int
    bn: int
    bk: int
    warps: int
    stages: int


RANK_BUCKETS = (16, 32)
"""Ranks of one pass; a higher rank takes several, so that it costs the others in the batch nothing."""

SINGLE_ROW_RANKS = 16
"""Ranks of one pass for a row that is alone with its adapter, whatever ranks the pool holds."""

_WIDE = 1024
"""From this many columns on, a program takes more of them."""


def rank_bounds(max_rank: int) -> tuple[int, ...]:
    """Highest ranks that steps are prepared and captured for, ascending, for a pool that takes up to `max_rank`.

    The usual ranks fit one pass of the smallest bucket; a pool that may hold more would otherwise take several passes
    for everybody.
    """
    return (RANK_BUCKETS[0], max_rank) if max_rank > RANK_BUCKETS[0] else (max_rank,)


def rank_bucket(max_rank: int) -> int:
    """The ranks of one pass for a pool whose adapters have up to `max_rank`."""
    return next((bucket for bucket in RANK_BUCKETS if max_rank <= bucket), RANK_BUCKETS[-1])


def splits_of(k_size: int, *, small: bool) -> int:
    """Planes over which x·Aᵀ of `k_size` inputs is summed.

    Args:
        k_size: inputs. Never the batch: a row then has the same bits in every batch of its kind.
        small: of decode tiles, whose few rows leave a device idle; planes of large tiles are as many bytes as y.
    """
    if not small:
        return max(1, min(4, k_size // 1024))
    per_plane = 512 * max(1, -(-k_size // (512 * 16)))
    return max(1, k_size // per_plane)


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The type that decides tiles: float32 if there is one (its products do not run on the tensor cores), else fp16."""
    return next((d for d in (torch.float32, torch.float16) if d in dtypes), torch.bfloat16)


def decode_tiles(bucket: int, columns: int, dtype: torch.dtype, align: int) -> Tiles:
    """Tiles of `shrink` and `expand` for small batches.

    Args:
        bucket: from `rank_bucket`.
        columns: of the site's widest module.
        dtype: from `widest`.
        align: as in `DeviceTables`. Single elements take more registers to load than groups of 16 bytes.
    """
    if dtype == torch.float32 or align == 1:
        return Tiles(SMALL_TILE, 16, 64, 32, warps=4, stages=2)
    wide = columns >= _WIDE and dtype == torch.bfloat16
    return Tiles(SMALL_TILE, bucket, 128 if wide else 64, 128, warps=4, stages=3)


def single_row_inputs(dtype: torch.dtype) -> int:
    """Inputs at a time of a row that is alone with its adapter: 16 KiB of weights.

    Args:
        dtype: from `widest`.
    """
    return (4096 if dtype == torch.float32 else 8192) // SINGLE_ROW_RANKS


def single_row_columns(dtype: torch.dtype, align: int) -> int:
    """Columns that a program adds to such a row: 32 KiB of weights. Fewer and larger programs were faster.

    Args:
        dtype: from `widest`.
        align: as in `DeviceTables`.
    """
    return (4096 if align == 1 else 8192 if dtype == torch.float32 else 16384) // SINGLE_ROW_RANKS


def prefill_tiles(bucket: int, dtype: torch.dtype) -> Tiles:
    """Tiles of `shrink` and `expand` for large batches."""
    if dtype == torch.float32:
        return Tiles(LARGE_TILE, 16, 32, 32, warps=8, stages=2)
    if dtype == torch.float16:  # its weights too are split in two: half the columns fit the registers
        return Tiles(LARGE_TILE, bucket, 64, 64, warps=8, stages=3)
    return Tiles(LARGE_TILE, bucket, 128, 64, warps=8, stages=3)


def expand_tiles(bucket: int, dtype: torch.dtype, align: int) -> Tiles:
    """Tiles of `expand` for large batches: small ones, of which a multiprocessor holds several at once."""
    if dtype == torch.float32 or align == 1:
        return Tiles(32, 16, 32, 0, warps=4, stages=2)
    return Tiles(32, bucket, 128 if dtype == torch.bfloat16 else 64, 0, warps=4, stages=2)


def blocks_per_program(blocks: int, device: torch.device) -> int:
    """Blocks of columns that a program of `expand` takes: few enough programs for one wave, where there are many.

    Changes no bit of the result.
    """
    return max(1, min(8, blocks // (_EXPAND_PROGRAMS * _processors(device))))


def helpers(programs: int, most: int, device: torch.device) -> int:
    """How many times as many programs a decode launch of `expand` has, so that tiles are shared where there are few.

    Changes no bit of the result.
    """
    return max(1, min(most, 2 * _processors(device) // programs))


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends (programmatic dependent launch)."""
    return arch_of(device) in {"sm90", "sm100"} and not interpreted(device)


def wgrad_tiles(bucket: int, dtype: torch.dtype) -> Tiles:
    """Tiles of `lora_wgrad`; bm is the number of rows added per step."""
    if dtype == torch.float32:
        return Tiles(32, 16, 64, 0, warps=4, stages=2)
    return Tiles(32, bucket, 128, 0, warps=4, stages=2)


def paged_tiles(group: int, dim: int, dtype: torch.dtype, arch: Arch) -> Tiles:
    """Tiles of `paged_decode`: bm query heads of a key head, bn keys per step, bk columns of a head.

    Of five stages two hold keys and values; the others prefetch the block tables that say where these lie.

    Args:
        group: query heads of a key head.
        dim: of a head.
        dtype: of the cache.
        arch: of the device.
    """
    bm, bd = (max(16, 1 << (size - 1).bit_length()) for size in (group, dim))
    bn = 64
    for costly in (dtype == torch.float32, bd > 128, bm > 16):
        bn //= 1 + costly
    stages = 2 if arch == "gfx942" else 3 if dtype == torch.float32 else 5
    return Tiles(bm, 0, max(16, bn), bd, warps=4, stages=stages)


def programs_per_row(most: int, rows: int) -> int:
    """Programs of `paged_decode` that share the splits of a row and key head; changes no bit of the result.

    Args:
        most: splits that a row can have.
        rows: rows times key heads.
    """
    return min(most, max(4, _PAGED_PROGRAMS // rows))


def interpreted(device: torch.device) -> bool:
    """Whether kernels run in Triton's interpreter: on the CPU they run nowhere else. Its bf16 products are wrong."""
    return device.type == "cpu"


@functools.cache
def arch_of(device: torch.device) -> Arch:
    """The table's name of a device's architecture; a newer or unknown one is treated as the nearest older one."""
    if device.type != "cuda":
        return "sm90"  # the interpreter
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm100" if major >= 10 else "sm90" if major == 9 else "sm80"


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def term_count(weight: torch.dtype, out: torch.dtype) -> int:
    """Into how many bf16 parts a float32 S is split before it meets `weight`; 0: it is not (see `dot_planes`)."""
    if weight == torch.float32:
        return 0
    return 3 if out == torch.float32 else 2
