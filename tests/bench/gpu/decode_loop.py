"""A decode step of Llama-3-8B's shape under one CUDA graph: all projections of 32 layers, without attention or head.

The base's weights, 14 GB, are read once per step, as in a real one. What is left out is the same with and without
adapters, so an overhead here is above that of a whole step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenora_kernels.gpu import backend
from tenora_kernels.gpu.context import GpuBatch, GpuLora
from tenora_kernels.layout import LoraSite, LoraTables
from tests.bench.gpu.protocol import LLAMA, Measurement
from tests.bench.gpu.timing import captured, measure

LAYERS = 32
ROWS = (1, 8, 32, 64, 128)
RANK = 16
# Beside the weights and adapters: activations, graphs, the allocator's slack.
SPARE_BYTES = 6 << 30


def model_bytes() -> int:
    """Of the projections' weights, in bf16."""
    return LAYERS * sum(2 * group.inputs * sum(group.outputs) for group in LLAMA)


def adapter_bytes() -> int:
    """Of one adapter of rank 16 on all seven projections of every layer."""
    return LAYERS * sum(2 * RANK * (group.inputs + out) for group in LLAMA for out in group.outputs)


def sites() -> list[list[LoraSite]]:
    """The four groups of every layer; table rows in the order q, k, v, o, gate, up, down."""
    found, row = [], 0
    for _ in range(LAYERS):
        layer = []
        for group in LLAMA:
            bounds = [sum(group.outputs[:j]) for j in range(len(group.outputs) + 1)]
            layer.append(LoraSite(row, group.inputs, tuple(itertools.pairwise(bounds))))
            row += len(group.outputs)
        found.append(layer)
    return found


class Loop:
    """Weights of the base and of `adapters` adapters, all random."""

    def __init__(self, adapters: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(0.01)

        self.sites = sites()
        self.weights = [[random(sum(group.outputs), group.inputs) for group in LLAMA] for _ in range(LAYERS)]
        modules = [(group.inputs, out) for _ in range(LAYERS) for group in LLAMA for out in group.outputs]
        arena = random(adapters * adapter_bytes() // 2)
        self.tables = LoraTables.empty(
            arena, in_features=[i for i, _ in modules], out_features=[o for _, o in modules], slots=adapters
        )
        for slot in range(adapters):
            self.tables.place(slot, slot * adapter_bytes() // 2, [RANK] * len(modules), [1.0] * len(modules))
        self.prepared = GpuLora(self.tables, max_rows=max(ROWS), max_rank=RANK)

    def step(self, hidden: Tensor, batch: GpuBatch | None) -> Tensor:
        """One pass over the layers; hidden [T, 4096]."""
        for weights, layer in zip(self.weights, self.sites, strict=True):
            qkv = self._project(hidden, weights[0], layer[0], batch)
            hidden = hidden + self._project(qkv[:, :4096].contiguous(), weights[1], layer[1], batch)
            gate, up = self._project(F.rms_norm(hidden, (4096,)), weights[2], layer[2], batch).chunk(2, dim=1)
            hidden = hidden + self._project(F.silu(gate) * up, weights[3], layer[3], batch)
        return hidden

    @staticmethod
    def _project(x: Tensor, weight: Tensor, site: LoraSite, batch: GpuBatch | None) -> Tensor:
        y = F.linear(x, weight)
        if batch is not None:
            backend.forward(y, x, site, batch)
        return y


def run() -> list[dict[str, Any]]:
    """Milliseconds of a step of the base and with adapters, and their ratio, per number of rows and distribution.

    One graph per number of rows serves every distribution: only the slots in its buffer change.
    """
    free = torch.cuda.mem_get_info()[0] - model_bytes() - SPARE_BYTES
    adapters = min(max(ROWS), free // adapter_bytes())
    if adapters < 1:
        return [{"skipped": f"{model_bytes() / 1e9:.0f} GB of weights do not fit this device."}]
    loop, results = Loop(adapters), []
    for rows in ROWS:
        hidden = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        slots = torch.zeros(rows, dtype=torch.int32, device="cuda")
        graphs = {"base": captured(_base(loop, hidden)), "adapters": captured(_adapted(loop, hidden, slots))}
        for distribution in ("distinct", "zipf", "identical"):
            mix = [slot % adapters for slot in Measurement(LLAMA[0], rows, distribution=distribution).slots()]
            slots.copy_(torch.tensor(mix, dtype=torch.int32))
            times = measure(graphs, rounds=20)
            base, ours = times["base"], times["adapters"]
            results.append(
                {
                    "rows": rows,
                    "distribution": distribution,
                    "adapters": len(set(mix)),
                    "ratio": round(ours.median / base.median, 4),
                    "base_ms": round(base.median, 4),
                    "adapters_ms": round(ours.median, 4),
                    "tokens_per_s": round(1e3 * rows / ours.median, 1),
                }
            )
    return results


def _base(loop: Loop, hidden: Tensor) -> Callable[[], None]:
    def work() -> None:
        loop.step(hidden, None)

    return work


def _adapted(loop: Loop, hidden: Tensor, slots: Tensor) -> Callable[[], None]:
    def work() -> None:
        loop.step(hidden, loop.prepared.batch(slots))

    return work
