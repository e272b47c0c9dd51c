"""One projection group after another: the bare GEMM, ours with it, and the peers' ways with it, in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tenora_kernels.gpu import backend
from tests.bench.gpu.protocol import Measurement
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.timing import captured, measure


def ways(setting: Setting, weights: list[Tensor]) -> dict[str, Callable[[], None]]:
    """What is timed: each computes x·Wᵀ of every layer into y, all but the first with the low-rank term."""
    x, y, sums = setting.x, setting.y, setting.sums()
    prepared, layers = setting.prepared, list(zip(setting.sites, weights, strict=True))
    used = len({slot for slot in setting.case.slots() if slot >= 0})

    def base() -> None:
        for _, weight in layers:
            torch.mm(x, weight.t(), out=y)

    def ours() -> None:
        batch = prepared.batch(setting.slot_of_row, max_segments=used)
        for site, weight in layers:
            torch.mm(x, weight.t(), out=y)
            backend.forward(y, x, site, batch)

    def sgmv() -> None:
        for peer, (_, weight) in zip(setting.sgmv, layers, strict=True):
            torch.mm(x, weight.t(), out=y)
            peer.add(y, x, sums)

    def grouped() -> None:
        for peer, (_, weight) in zip(setting.grouped, layers, strict=True):
            torch.mm(x, weight.t(), out=y)
            peer.add(y, x)

    return {"base": base, "ours": ours, "sgmv": sgmv, "grouped_mm": grouped}


def run(case: Measurement, bandwidth: float) -> dict[str, Any]:
    """Measure one case.

    Returns:
        Microseconds per layer of every way, its ratio to the bare GEMM, and for ours the rate at which true-rank bytes
        were read in the time beyond the GEMM, also as a share of `bandwidth`. A way that cannot run has its error.
    """
    setting = Setting.build(case, torch.device("cuda"))
    generator = torch.Generator(device="cuda").manual_seed(1)
    shape = (sum(case.group.outputs), case.group.inputs)
    weights = [
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.02) for _ in setting.sites
    ]
    graphs, errors = {}, {}
    for name, work in ways(setting, weights).items():
        try:
            graphs[name] = captured(work)
        except RuntimeError as error:  # a peer's op may not exist on this device; the others are measured
            if name in {"base", "ours"}:
                raise
            errors[name] = str(error).splitlines()[0]
    layers = len(weights)
    return report(case, {name: 1e3 * t.median / layers for name, t in measure(graphs).items()}, bandwidth) | {
        "low_us": {name: round(1e3 * t.low / layers, 3) for name, t in measure(graphs, rounds=10).items()},
        "errors": errors,
    }


def report(case: Measurement, us: dict[str, float], bandwidth: float) -> dict[str, Any]:
    """The figures of a case from microseconds per layer."""
    beyond = us["ours"] - us["base"]
    rate = case.true_bytes() / (beyond / 1e6) if beyond > 0 else None
    return {
        "case": case.name,
        "ratio": {name: round(t / us["base"], 4) for name, t in us.items()},
        "us": {name: round(t, 3) for name, t in us.items()},
        "low_rank_gb_per_s": None if rate is None else round(rate / 1e9, 1),
        "share_of_copy_bandwidth": None if rate is None else round(rate / bandwidth, 4),
    }
