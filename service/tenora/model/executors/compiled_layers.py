"""Training passes on packed weights: a layer is one compiled job forward and one backward.

They keep about a fifth of what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from tenora.model.attention import PackedAttention
from tenora.model.context import ForwardContext
from tenora.model.executors.layers import Keep, LayerPass
from tenora.model.spec import ModelSpec
from tenora_kernels.cpu.attention.attention import Rope
from tenora_kernels.cpu.decoder.layers import Kept, StreamLayers, supports
from tenora_kernels.cpu.decoder.stack import PackedStack

__all__ = ["CompiledLayers", "CompiledPass"]


class CompiledLayers:
    """See `LayerExecutor`: streams without dropout, no longer than a window, with float32 adapters."""

    def __init__(self, spec: ModelSpec, stack: PackedStack) -> None:
        """`stack`: one that `tenora_kernels.cpu.decoder.layers.supports`."""
        self._spec, self._stack = spec, stack
        self._window = min((window for window in spec.sliding_window if window is not None), default=None)

    def supports(self, context: ForwardContext) -> bool:
        """See `LayerExecutor`."""
        attention = context.attention
        if context.lora_dropout is not None or not isinstance(attention, PackedAttention):
            return False
        fits = self._window is None or _longest(attention) <= self._window
        return fits and supports(self._stack, context.lora)

    def begin(
        self,
        context: ForwardContext,
        keep: Keep,
        before: Callable[[int], None] | None,  # noqa: ARG002  # for dropout
        first: int = 0,
    ) -> LayerPass:
        """See `LayerExecutor`."""
        attention = context.attention
        if not isinstance(attention, PackedAttention):
            raise TypeError("the compiled layers need PackedAttention.")
        rope = Rope(*context.rope)
        return CompiledPass(
            StreamLayers(self._stack, attention.cu_seqlens, attention.prefixes, rope, context.lora), keep, first
        )

    def kept_bytes_per_token(self, rank: int) -> int:
        """See `LayerExecutor`."""
        spec = self._spec
        columns = 2 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + 2 * spec.intermediate_size
        low_rank = len(spec.layout.modules) * (-(-rank // 8) * 8)
        return 4 * spec.num_layers * (columns + spec.num_heads + low_rank)

    def release(self) -> None:
        """See `LayerExecutor`."""
        self._stack.workspace.release()


def _longest(attention: PackedAttention) -> int:
    """Most tokens that one token of a stream sees, itself included."""
    lengths = [stop - start for start, stop in pairwise(attention.cu_seqlens)]
    before = attention.prefixes or [None] * len(lengths)
    seen = (own + (0 if prefix is None else prefix[1]) for own, prefix in zip(lengths, before, strict=True))
    return max(seen, default=0)


class CompiledPass:
    """`LayerPass` on packed weights."""

    def __init__(self, layers: StreamLayers, keep: Keep, first: int = 0) -> None:
        self._layers = layers
        self._keep = keep
        self._first = first
        self._inputs: dict[int, Tensor] = {}
        self._kept: dict[int, Kept] = {}

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """See `LayerPass`."""
        out, kept = self._layers.forward(index, hidden)
        trained = index >= self._first
        if self._keep is Keep.ALL and trained:
            self._kept[index] = kept
            return out
        if self._keep is Keep.INPUTS and trained:
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
