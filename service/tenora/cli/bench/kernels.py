"""What `tenora bench kernels` does: the low-rank op beside the bare GEMM, at the shapes of a decode or prefill step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tenora.cli.bench.figures import percentile
from tenora.cli.bench.workload import Distribution
from tenora.errors import InvalidRequestError
from tenora.model.layout import Site, Sizes, gated_decoder
from tenora.model.loading import resolve_device, resolve_dtype
from tenora_kernels.layout import BASE, LoraBatch, LoraSegments, LoraSite, LoraTables, build_segments
from tenora_kernels.ops import add_lora

MICRO = 1e6
WORKING_SET = 256 * 2**20
"""Bytes of weights that one pass goes through, so that no cache holds them: in a real step none does either."""
MAX_LAYERS = 32
WARM_UP = 2
MIN_PASSES, MAX_PASSES, PASS_SECONDS = 5, 200, 0.5


SHAPES = {
    "smollm2-135m": gated_decoder(Sizes(hidden=576, mlp=1536, heads=9, kv_heads=3, head_dim=64)).sites,
    "qwen3-0.6b": gated_decoder(Sizes(hidden=1024, mlp=3072, heads=16, kv_heads=8, head_dim=128)).sites,
    "llama-3-8b": gated_decoder(Sizes(hidden=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128)).sites,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `rows` tokens, spread over as many adapters, whose ranks are `ranks` in turn."""

    shape: str
    rows: int
    ranks: tuple[int, ...]
    distribution: Distribution
    base_share: float
    seed: int


@dataclass(frozen=True, slots=True)
class Bench:
    """The tensors of one case and site, in several copies that stand for the layers of a model."""

    x: Tensor
    y: Tensor
    weights: list[Tensor]
    sites: list[LoraSite]
    batch: LoraBatch
    nbytes: int

    @classmethod
    def build(cls, case: Case, site: Site, device: torch.device, dtype: torch.dtype) -> Bench:
        """Random tensors; adapters lie as bfloat16, as files do, wherever the base does not compute in float16."""
        slots = max(1, case.rows)
        ranks = [case.ranks[slot % len(case.ranks)] for slot in range(slots)]
        is_bf16 = dtype == torch.float32 and device.type == "cpu"
        total = site.output
        width = site.input * len(site.modules) + total
        size = 2 if is_bf16 else dtype.itemsize
        layers = _layers(min(sum(ranks) * width * size, site.output * site.input * dtype.itemsize))
        tables = _tables(site, layers, ranks, device, dtype, is_bf16=is_bf16)
        segments = build_segments(_slots(case), device=device)
        used = sum(ranks[slot] for slot in segments.seg_slot)
        return cls(
            x=torch.randn(case.rows, site.input, device=device, dtype=dtype),
            y=torch.zeros(case.rows, total, device=device, dtype=dtype),
            weights=[torch.randn(total, site.input, device=device, dtype=dtype) for _ in range(layers)],
            sites=list(_sites(site, layers)),
            batch=LoraBatch(tables, segments),
            nbytes=used * width * size + _row_bytes(segments, site, dtype),
        )


def _layers(nbytes: int) -> int:
    return max(1, min(MAX_LAYERS, math.ceil(WORKING_SET / max(1, nbytes))))


def _row_bytes(segments: LoraSegments, site: Site, dtype: torch.dtype) -> int:
    """Reading x once and y once, and writing y."""
    return segments.adapted * (site.input + 2 * site.output) * dtype.itemsize


def _slots(case: Case) -> list[int]:
    drawn = case.distribution.draw(max(1, case.rows), case.rows, case.seed)
    of_base = round(case.rows * case.base_share)
    return [BASE if slot is None or row >= case.rows - of_base else slot for row, slot in enumerate(drawn)]


def _sites(site: Site, layers: int) -> Iterator[LoraSite]:
    for layer in range(layers):
        yield LoraSite(row=layer * len(site.modules), in_features=site.input, slices=site.slices)


def _tables(
    site: Site, layers: int, ranks: Sequence[int], device: torch.device, dtype: torch.dtype, *, is_bf16: bool
) -> LoraTables:
    inputs = [site.input] * len(site.modules) * layers
    outputs = [module.output for module in site.modules] * layers
    per_rank = sum(inputs) + sum(outputs)
    elements = sum((rank * per_rank + 1) // 2 if is_bf16 else rank * per_rank for rank in ranks)
    arena = torch.zeros(elements, device=device, dtype=dtype)
    (arena.view(torch.bfloat16) if is_bf16 else arena).normal_(std=0.02)
    tables = LoraTables.empty(arena, in_features=inputs, out_features=outputs, slots=len(ranks))
    offset = 0
    for slot, rank in enumerate(ranks):
        offset += tables.place(slot, offset, [rank] * tables.rows, [2.0] * tables.rows, is_bf16=is_bf16)
    return tables


def measure(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One row of figures per site, in µs a layer, and their sum as the group `layer`."""
    rows = []
    for site in SHAPES[case.shape]:
        bench = Bench.build(case, site, device, dtype)
        with torch.inference_mode():
            gemm = _time(partial(_gemm, bench), device) / len(bench.sites)
            lora = _time(partial(_low_rank, bench), device) / len(bench.sites)
        rows.append(_row(case, site.name, gemm, lora, bench.nbytes))
        yield rows[-1]
    total = [sum(row[name] for row in rows) for name in ("gemm_us", "lora_us", "lora_bytes")]
    yield _row(case, "layer", total[0] / MICRO, total[1] / MICRO, total[2])


def _row(case: Case, group: str, gemm: float, lora: float, nbytes: int) -> dict[str, Any]:
    kind = case.distribution.kind
    return {
        "shape": case.shape,
        "group": group,
        "rows": case.rows,
        "ranks": list(case.ranks),
        "distribution": f"zipf:{case.distribution.exponent}" if kind == "zipf" else kind,
        "base_share": case.base_share,
        "gemm_us": gemm * MICRO,
        "lora_us": lora * MICRO,
        "lora_per_gemm": lora / gemm,
        "lora_bytes": nbytes,
        "lora_gb_per_s": nbytes / lora / 1e9,
    }


def _gemm(bench: Bench) -> None:
    for weight in bench.weights:
        functional.linear(bench.x, weight)


def _low_rank(bench: Bench) -> None:
    for site in bench.sites:
        add_lora(bench.y, bench.x, site, bench.batch)


def _time(work: Callable[[], None], device: torch.device) -> float:
    """Median seconds of one pass."""
    for _ in range(WARM_UP):
        work()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < MIN_PASSES or (len(times) < MAX_PASSES and time.perf_counter() - started < PASS_SECONDS):
        _wait(device)
        before = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - before)
    return percentile(times, 50)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose(device: str, dtype: str, threads: int) -> tuple[torch.device, torch.dtype]:
    """The device and type that the names mean on this machine, as for a server; sets the number of threads.

    Raises:
        ConfigurationError: there is no such device or type here.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = resolve_device(device)
    return chosen, resolve_dtype(dtype, chosen)


def grid(
    shapes: Sequence[str],
    rows: Sequence[int],
    ranks: Sequence[int],
    distributions: Sequence[str],
    base_share: float,
    seed: int,
) -> list[Case]:
    """Every combination.

    Raises:
        InvalidRequestError: an unknown shape or distribution, or a number of rows below 1.
    """
    for shape in shapes:
        if shape not in SHAPES:
            raise InvalidRequestError(f"There is no shape {shape!r}; use one of {', '.join(SHAPES)}.")
    if min(rows) < 1:
        raise InvalidRequestError("A step has at least one row.")
    return [
        Case(shape, count, tuple(ranks), Distribution.parse(name), base_share, seed)
        for shape in shapes
        for count in rows
        for name in distributions
    ]


def describe(device: torch.device) -> str:
    """The device's name and, of a CPU, the threads that work."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads"
