"""The engine's decode step of Llama-3-8B's shape: from token ids on the host to the next ones, through `DecodeGraphs`.

All of it is there: filling the buffer, attention over the pages, the head, and the wait for the tokens. Times are the
host's. The same work launched kernel by kernel stands beside it, and the same rows without adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import AdapterRows
from tenora.model.executors.base import Batch
from tenora.model.executors.decode_graphs import Capture, CudaCapture, DecodeGraphs
from tenora.model.spec import ModelSpec, target_modules
from tenora.model.weights.dense import Dense
from tenora_kernels.flags import EPILOGUE
from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.layout import BASE, LoraBatch, LoraTables
from tests.bench.gpu.decode_loop import RANK, SPARE_BYTES, adapter_bytes, model_bytes
from tests.bench.gpu.protocol import LLAMA, Measurement
from tests.engine.graphs import Rerun

ROWS = (1, 8, 32, 64, 128, 256)
MAX_RANK = 256  # of the pool, as it is by default; the adapters have `RANK`
CONTEXT = 1024
BLOCK = 16


def llama_8b() -> ModelSpec:
    """Llama-3-8B."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    return ModelSpec.from_config({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes, **heads})


class EngineLoop:
    """A random base and random adapters on `device`, and sequences of `context` tokens."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, *, rows: int, adapters: int, context: int
    ) -> None:
        self.rows, self.context, self.blocks = rows, context, -(-context // BLOCK)
        self.decoder = Decoder(spec, dtype=dtype, device=device)
        for weight in self.decoder.weights():
            if isinstance(weight, Dense):
                weight.values.normal_(std=0.02)
        self.cache = KVCache.allocate(spec, rows * self.blocks, BLOCK, dtype=dtype, device=device)
        for part in (*self.cache.k, *self.cache.v):
            part.normal_()
        targets = target_modules(spec)
        ins, outs = [target.in_features for target in targets], [target.out_features for target in targets]
        size = RANK * (sum(ins) + sum(outs))
        arena = torch.empty(adapters * size, dtype=dtype, device=device).normal_(std=0.02)
        self.tables = LoraTables.empty(arena, in_features=ins, out_features=outs, slots=adapters)
        for slot in range(adapters):
            self.tables.place(slot, slot * size, [RANK] * len(ins), [1.0] * len(ins))

    def graphs(self, lora: AdapterRows, capture: Capture) -> DecodeGraphs:
        """Decode steps of this base."""
        return DecodeGraphs(
            self.decoder, self.cache, lora, capture, max_rows=self.rows, max_context=self.blocks * BLOCK
        )

    @torch.no_grad()
    def step(self, graphs: DecodeGraphs, slots: list[int]) -> list[int]:
        """The next tokens of as many sequences as there are slots."""
        count = len(slots)
        tables = np.arange(count * self.blocks, dtype=np.int32).reshape(count, self.blocks)
        positions = np.full(count, self.context - 1)
        kv_slots = tables[:, -1] * BLOCK + (self.context - 1) % BLOCK
        rows = Batch(np.arange(count), positions, kv_slots, np.array(slots), tables, None)
        return self.decoder.logits(graphs.run(rows)).argmax(dim=-1).tolist()


class AnyRank:
    """Steps run the kernels for the highest rank of the pool, whatever their rows have: as it was, to compare with."""

    def __init__(self, lora: AdapterRows) -> None:
        self._lora = lora
        self.bounds = lora.bounds[-1:]

    def refresh(self) -> bool:
        return self._lora.refresh()

    def bound(self, slots: npt.NDArray[np.integer[Any]]) -> int:
        return self._lora.bound(slots) and self.bounds[-1]

    def flags(self, slots: npt.NDArray[np.integer[Any]]) -> int:
        return self._lora.flags(slots)

    def batch(self, slot_of_row: torch.Tensor, *, max_rank: int | None = None, flags: int = EPILOGUE) -> LoraBatch:
        return self._lora.batch(slot_of_row, max_rank=max_rank, flags=flags)


def compare(
    loop: EngineLoop,
    captured: DecodeGraphs,
    launched: DecodeGraphs,
    any_rank: DecodeGraphs,
    slots: list[int],
    *,
    rounds: int,
) -> dict[str, Any]:
    """Milliseconds of a step, in turn within every round."""
    ways: dict[str, Callable[[], list[int]]] = {
        "base_ms": lambda: loop.step(captured, [BASE] * len(slots)),
        "adapters_ms": lambda: loop.step(captured, slots),
        "launched_ms": lambda: loop.step(launched, slots),
        "any_rank_ms": lambda: loop.step(any_rank, slots),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 3):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn >= 3:  # the first ones compile, capture, and warm the clocks up
                taken[name].append(1e3 * (time.perf_counter() - started))
    times = {name: median(values) for name, values in taken.items()}
    return {
        "rows": len(slots),
        "adapters": len(set(slots)),
        "context": loop.context,
        "ratio": round(times["adapters_ms"] / times["base_ms"], 4),
        **{name: round(value, 4) for name, value in times.items()},
        "tokens_per_s": round(1e3 * len(slots) / times["adapters_ms"], 1),
    }


def prepare() -> tuple[EngineLoop, GpuLora] | str:
    """A base of 8B with its adapters, or why there is none."""
    spec, device = llama_8b(), torch.device("cuda")
    cache_bytes = max(ROWS) * -(-CONTEXT // BLOCK) * KVCache.bytes_per_block(spec, BLOCK, torch.bfloat16)
    head_bytes = 2 * 2 * spec.vocab_size * spec.hidden_size
    free = torch.cuda.mem_get_info()[0] - model_bytes() - head_bytes - cache_bytes - SPARE_BYTES
    adapters = min(max(ROWS), free // adapter_bytes())
    if adapters < 1:
        return f"{(model_bytes() + head_bytes + cache_bytes) / 1e9:.0f} GB of weights and keys do not fit this device."
    loop = EngineLoop(spec, device, torch.bfloat16, rows=max(ROWS), adapters=adapters, context=CONTEXT)
    return loop, GpuLora(loop.tables, max_rows=4096, max_rank=MAX_RANK)


def run(loop: EngineLoop, lora: GpuLora) -> list[dict[str, Any]]:
    """A step of `ROWS` rows, with distinct adapters and with one for all."""
    capture, adapters = CudaCapture(loop.decoder.device), loop.tables.slots
    captured, launched = loop.graphs(lora, capture), loop.graphs(lora, Rerun)
    any_rank = loop.graphs(AnyRank(lora), capture)
    results = []
    for rows in ROWS:
        for distribution in ("distinct", "identical"):
            mix = [slot % adapters for slot in Measurement(LLAMA[0], rows, distribution=distribution).slots()]
            results.append(
                {"distribution": distribution, **compare(loop, captured, launched, any_rank, mix, rounds=20)}
            )
    return results
