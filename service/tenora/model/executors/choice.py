"""Which executor computes a base's steps: decided once, by the device and by how weights, cache and adapters lie."""

from __future__ import annotations

from tenora.model.cache import KVCache
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import HostAdapters
from tenora.model.executors.base import Executor
from tenora.model.executors.compiled_cpu import CompiledExecutor
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.executors.decode_graphs import CudaCapture, DecodeGraphs
from tenora.model.executors.modules import ModulesExecutor
from tenora_kernels.layout import LoraTables

__all__ = ["executor_for"]


def executor_for(
    decoder: Decoder,
    cache: KVCache,
    tables: LoraTables,
    *,
    max_rows: int,
    max_tokens: int,
    max_context: int,
    max_rank: int,
) -> Executor:
    """The fastest executor that supports them.

    Args:
        decoder: the base.
        cache: its blocks.
        tables: of the pool of adapters, on the same device.
        max_rows: most sequences of a step.
        max_tokens: most tokens of a step, chunks of prompts included.
        max_context: most tokens of a sequence.
        max_rank: highest rank that an adapter may have.
    """
    if decoder.device.type == "cuda":
        # Imported when it is needed: Triton takes a second, and a machine without a card may lack it.
        from tenora_kernels.gpu.context import GpuLora  # noqa: PLC0415  # see above

        lora = GpuLora(tables, max_rows=max_tokens, max_rank=max_rank)
        capture = CudaCapture(decoder.device)
        graphs = DecodeGraphs(decoder, cache, lora, capture, max_rows=max_rows, max_context=max_context)
        return GraphExecutor(decoder, cache, graphs)
    if CompiledExecutor.supports(decoder, cache, tables):
        return CompiledExecutor(decoder, cache, tables)
    return ModulesExecutor(decoder, cache, HostAdapters(tables, decoder.device))
