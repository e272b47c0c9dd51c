"""Training passes on the decoder's modules, each layer with an autograd graph of its own: everywhere, with dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tenora.model.context import ForwardContext
from tenora.model.decoder import Decoder
from tenora.model.executors.layers import Keep, LayerPass

__all__ = ["ModuleLayers", "ModulePass"]


class ModuleLayers:
    """See `LayerExecutor`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def supports(self, context: ForwardContext) -> bool:  # noqa: ARG002  # the protocol's
        """See `LayerExecutor`: any stream."""
        return True

    def begin(
        self, context: ForwardContext, keep: Keep, before: Callable[[int], None] | None, first: int = 0
    ) -> LayerPass:
        """See `LayerExecutor`."""
        return ModulePass(self._decoder, context, keep, before, first)

    def kept_bytes_per_token(self, rank: int) -> int:  # noqa: ARG002  # little beside the rest
        """See `LayerExecutor`: a kept graph, roughly; every product's output and input, norms in float32."""
        spec, size = self._decoder.spec, self._decoder.dtype.itemsize
        attention = 6 * (spec.q_size + 2 * spec.kv_size)
        return spec.num_layers * size * (12 * spec.hidden_size + attention + 7 * spec.intermediate_size)

    def release(self) -> None:
        """See `LayerExecutor`: torch's allocator keeps what it keeps."""


class ModulePass:
    """`LayerPass` on the decoder's modules, each layer with an autograd graph of its own."""

    def __init__(
        self,
        decoder: Decoder,
        context: ForwardContext,
        keep: Keep,
        before: Callable[[int], None] | None,
        first: int = 0,
    ) -> None:
        self._decoder, self._context, self._keep, self._before, self._first = decoder, context, keep, before, first
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """See `LayerPass`."""
        if self._keep is Keep.NOTHING or index < self._first:
            return self._run(index, hidden, graph=False)
        # Below the first trained layer nothing needs a gradient.
        self._inputs[index] = hidden.detach().requires_grad_(index > self._first)
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
