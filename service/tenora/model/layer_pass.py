"""A training pass through the layers, one call per layer and direction, on whatever computes them.

On packed weights a layer is one compiled job forward and one backward, which keep about a fifth of what autograd keeps.
Elsewhere (CUDA, other types, dropout, windows shorter than a row) the decoder's modules run with an autograd graph per
layer. Both add dA and dBᵀ of every slot to `context.lora.tables.grad`, and neither wants grad mode to be on around it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora_kernels.cpu.attention.attention import Rope
from tenora_kernels.cpu.decoder.layers import Kept, StreamLayers, supports

__all__ = ["Keep", "LayerPass", "kept_bytes_per_token", "layer_pass", "release_buffers"]


class Keep(Enum):
    """What a pass keeps for its backward pass."""

    NOTHING = "nothing"
    """There is no backward pass."""
    INPUTS = "inputs"
    """The layers' inputs: each layer then runs a second time."""
    ALL = "all"
    """All that a backward pass needs."""


class LayerPass(Protocol):
    """One stream's way through the layers, up and down again."""

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] after layer `index`; layers come in order. Valid until the layer's `backward`."""
        ...

    def backward(self, index: int, d_out: Tensor, *, need_dx: bool = True) -> Tensor | None:
        """From the gradient of the layer's output [T, H] to that of its input, and to the adapters' gradients.

        Layers come in the opposite order. None if `need_dx` is false.
        """
        ...

    def close(self) -> None:
        """Free what is still kept; also for a pass that is abandoned."""
        ...


def layer_pass(
    decoder: Decoder, context: ForwardContext, keep: Keep, *, before: Callable[[int], None] | None = None
) -> LayerPass:
    """Begin a pass.

    Args:
        decoder: the base.
        context: with `PackedAttention`; unchanged until the pass is over, as are the tables of its adapters.
        keep: what for.
        before: called with a layer's index before it runs, every time that it does: where dropout finds its numbers.
    """
    if _is_compiled(decoder, context):
        return _CompiledPass(decoder, context, keep)
    return _ModulePass(decoder, context, keep, before)


def kept_bytes_per_token(decoder: Decoder, rank: int, keep: Keep, *, compiled: bool = True) -> int:
    """About what a pass keeps for each token of its stream, beside buffers that do not grow with the layers.

    Args:
        decoder: the base.
        rank: the largest of the stream's adapters, all modules adapted.
        keep: see `Keep`.
        compiled: whether `layer_pass` takes the compiled way (packed weights, no dropout).
    """
    spec, size = decoder.spec, decoder.dtype.itemsize
    if keep is not Keep.ALL:
        return spec.num_layers * size * spec.hidden_size if keep is Keep.INPUTS else 0
    if compiled and decoder.stack is not None:
        columns = 2 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + 2 * spec.intermediate_size
        return 4 * spec.num_layers * (columns + spec.num_heads + 7 * (-(-rank // 8) * 8))
    # A kept graph, roughly: every product's output and input, norms in float32.
    attention = 6 * (spec.q_size + 2 * spec.kv_size)
    return spec.num_layers * size * (12 * spec.hidden_size + attention + 7 * spec.intermediate_size)


def release_buffers(decoder: Decoder) -> None:
    """Give the memory of finished passes back to the system: when no training is left."""
    if decoder.stack is not None:
        decoder.stack.workspace.release()


def _is_compiled(decoder: Decoder, context: ForwardContext) -> bool:
    attention = context.attention
    if decoder.stack is None or context.lora_dropout is not None or not isinstance(attention, PackedAttention):
        return False
    lengths = [stop - start for start, stop in pairwise(attention.cu_seqlens)]
    before = attention.prefixes or [None] * len(lengths)
    longest = max(
        (own + (0 if prefix is None else prefix[1]) for own, prefix in zip(lengths, before, strict=True)), default=0
    )
    windows = [window for window in decoder.spec.sliding_window if window is not None]
    return longest <= min(windows, default=longest) and supports(decoder.stack, context.lora)


class _CompiledPass:
    """`LayerPass` on packed weights."""

    def __init__(self, decoder: Decoder, context: ForwardContext, keep: Keep) -> None:
        attention = context.attention
        if decoder.stack is None or not isinstance(attention, PackedAttention):
            raise TypeError("the compiled layers need packed weights and PackedAttention.")
        self._layers = StreamLayers(
            decoder.stack, attention.cu_seqlens, attention.prefixes, Rope(*context.rope), context.lora
        )
        self._keep = keep
        self._inputs: dict[int, Tensor] = {}
        self._kept: dict[int, Kept] = {}

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """See `LayerPass`."""
        out, kept = self._layers.forward(index, hidden)
        if self._keep is Keep.ALL:
            self._kept[index] = kept
            return out
        if self._keep is Keep.INPUTS:
            self._inputs[index] = hidden
        out = out.clone()
        kept.give_back()
        return out

    def backward(self, index: int, d_out: Tensor, *, need_dx: bool = True) -> Tensor | None:
        """See `LayerPass`."""
        kept = self._kept.pop(index, None)
        if kept is None:
            _, kept = self._layers.forward(index, self._inputs.pop(index))
        try:
            return self._layers.backward(index, kept, d_out, need_dx=need_dx)
        finally:
            kept.give_back()

    def close(self) -> None:
        """See `LayerPass`."""
        for kept in self._kept.values():
            kept.give_back()
        self._kept.clear()
        self._inputs.clear()


class _ModulePass:
    """`LayerPass` on the decoder's modules, each layer with an autograd graph of its own."""

    def __init__(
        self, decoder: Decoder, context: ForwardContext, keep: Keep, before: Callable[[int], None] | None
    ) -> None:
        self._decoder, self._context, self._keep, self._before = decoder, context, keep, before
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """See `LayerPass`."""
        if self._keep is Keep.NOTHING:
            return self._run(index, hidden, graph=False)
        # Below the first layer nothing needs a gradient but its adapters.
        self._inputs[index] = hidden.detach().requires_grad_(index > 0)
        out = self._run(index, self._inputs[index], graph=self._keep is Keep.ALL)
        if self._keep is Keep.ALL:
            self._outputs[index] = out
        return out.detach()

    def backward(self, index: int, d_out: Tensor, *, need_dx: bool = True) -> Tensor | None:
        """See `LayerPass`."""
        source, result = self._inputs.pop(index), self._outputs.pop(index, None)
        if need_dx and not source.requires_grad:
            source, result = source.requires_grad_(), None
        if result is None:
            result = self._run(index, source, graph=True)
        if need_dx:
            (dx,) = torch.autograd.grad(result, source, d_out)
            return dx
        if result.requires_grad:
            torch.autograd.backward(result, d_out)
        return None

    def close(self) -> None:
        """See `LayerPass`."""
        self._inputs.clear()
        self._outputs.clear()

    def _run(self, index: int, source: Tensor, *, graph: bool) -> Tensor:
        if self._before is not None:
            self._before(index)
        with torch.set_grad_enabled(graph):
            output: Tensor = self._decoder.layers[index](source, self._context)
        return output
