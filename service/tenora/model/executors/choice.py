"""Which executor computes a base: decided once, by the device and by how weights, cache and adapters lie."""

from __future__ import annotations

from collections.abc import Callable

from tenora.model.cache import KVCache
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.adapters import HostAdapters
from tenora.model.executors.base import Executor
from tenora.model.executors.compiled_cpu import CompiledExecutor
from tenora.model.executors.compiled_layers import CompiledLayers
from tenora.model.executors.cuda_graphs import GraphExecutor
from tenora.model.executors.decode_graphs import CudaCapture, DecodeGraphs
from tenora.model.executors.layers import Keep, LayerExecutor, LayerPass
from tenora.model.executors.module_layers import ModuleLayers
from tenora.model.executors.modules import ModulesExecutor
from tenora_kernels.cpu.decoder import layers
from tenora_kernels.layout import LoraTables

__all__ = ["executor_for", "kept_bytes_per_token", "layer_pass", "layers_for", "release_buffers"]


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
        # Imported when it is needed: Triton takes a second, and a machine without a GPU may lack it.
        from tenora_kernels.gpu.context import GpuLora  # noqa: PLC0415  # see above

        lora = GpuLora(tables, max_rows=max_tokens, max_rank=max_rank)
        capture = CudaCapture(decoder.device)
        graphs = DecodeGraphs(decoder, cache, lora, capture, max_rows=max_rows, max_context=max_context)
        return GraphExecutor(decoder, cache, graphs)
    if CompiledExecutor.supports(decoder, cache, tables):
        return CompiledExecutor(decoder, cache, tables)
    return ModulesExecutor(decoder, cache, HostAdapters(tables, decoder.device))


def layers_for(decoder: Decoder) -> tuple[LayerExecutor, ...]:
    """Who computes the layers of a base in training, the fastest first; the last one supports every stream."""
    modules = ModuleLayers(decoder)
    if decoder.stack is None or not layers.supports(decoder.stack, None):
        return (modules,)
    return CompiledLayers(decoder.spec, decoder.stack), modules


def layer_pass(
    decoder: Decoder,
    context: ForwardContext,
    keep: Keep,
    *,
    before: Callable[[int], None] | None = None,
    first: int = 0,
) -> LayerPass:
    """Begin a pass on the first of `layers_for` that supports the stream; see `LayerExecutor.begin`."""
    executor = next(executor for executor in layers_for(decoder) if executor.supports(context))
    return executor.begin(context, keep, before, first)


def kept_bytes_per_token(decoder: Decoder, rank: int, keep: Keep) -> int:
    """About what a pass keeps for each token of a usual stream; see `LayerExecutor.kept_bytes_per_token`."""
    if keep is Keep.ALL:
        return layers_for(decoder)[0].kept_bytes_per_token(rank)
    return decoder.spec.num_layers * decoder.dtype.itemsize * decoder.spec.hidden_size if keep is Keep.INPUTS else 0


def release_buffers(decoder: Decoder) -> None:
    """Give the memory of finished passes back to the system: when no training is left."""
    for executor in layers_for(decoder):
        executor.release()
