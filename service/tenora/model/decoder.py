"""The frozen decoder of the dense Llama family: the same modules serve and train.

Tokens of any number of sequences lie in one stream [T]; which belong together is the attention's business. Pre-norm
blocks, RMSNorm, rotary positions, grouped-query attention and a gated MLP (Touvron et al. 2023), with the variants of
Mistral (sliding window), Qwen2 (q, k, v biases) and Qwen3 (normalised q and k).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenora.adapters.table_rows import TableRows
from tenora.model.context import ForwardContext
from tenora.model.layout import Block, Matrix
from tenora.model.projection import Projection, bottleneck_site, lora_site
from tenora.model.rotary import Rotary
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.weights.base import Weight
from tenora.model.weights.dense import Dense
from tenora_kernels.cpu.decoder.stack import PackedStack
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.first_calls import make_first_calls
from tenora_kernels.ops import add_bottleneck

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · w over the last dimension, computed in float32 (Zhang and Sennrich 2019).

    As in transformers the product with the weight comes after rounding to the compute type.
    """

    weight: nn.Parameter

    def __init__(
        self,
        shape: tuple[int, ...],
        eps: float,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., n]; the type is kept."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Make(NamedTuple):
    """How the parts of a decoder are made: where, in which type, and how its matrices are had."""

    spec: ModelSpec
    rows: TableRows
    read: Callable[[Matrix], Weight]
    dtype: torch.dtype
    device: torch.device

    def norm(self, *shape: int) -> RMSNorm:
        """An `RMSNorm` with the model's ε."""
        return RMSNorm(shape, self.spec.rms_norm_eps, dtype=self.dtype, device=self.device)

    def projections(self, layer: int, block: Block) -> dict[str, Projection]:
        """The block's products, by the names of its sites."""
        layout = self.spec.layout
        return {
            site.name: Projection(
                lora_site(self.rows, layout, layer, site),
                self.read(layout.matrix(layer, block, site)),
                bias=site.bias,
                dtype=self.dtype,
                device=self.device,
            )
            for site in block.sites
        }


class SelfAttention(nn.Module):
    """Grouped-query attention of one layer with fused q, k and v; sites `qkv` and `o`."""

    def __init__(self, make: Make, layer: int, block: Block) -> None:
        super().__init__()
        spec = make.spec
        self.layer = layer
        self.window = spec.sliding_window[layer]
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        sites = make.projections(layer, block)
        self.qkv, self.o = sites["qkv"], sites["o"]
        # q heads and k heads are normalised together: one row of weights per head.
        normed = sum(heads for _, heads in block.head_norms)
        self.head_norm = make.norm(normed, spec.head_dim) if normed else None

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden [T, H] to [T, H]."""
        qkv = self.qkv(hidden, context).view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        attended = context.attention.attend_qkv(
            self.layer, qkv, self.num_kv_heads, context.rope, self.window, self.head_norm
        )
        return self.o(attended, context)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) with gate and up fused; sites `gate_up` and `down`."""

    def __init__(self, make: Make, layer: int, block: Block) -> None:
        super().__init__()
        sites = make.projections(layer, block)
        self.gate_up, self.down = sites["gate_up"], sites["down"]
        self.activation = ACTIVATIONS[make.spec.hidden_act]

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden [T, H] to [T, H]."""
        gate, up = self.gate_up(hidden, context).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up, context)  # type: ignore[no-any-return]  # untyped __call__


BLOCKS: dict[str, Callable[[Make, int, Block], nn.Module]] = {"attention": SelfAttention, "gated_mlp": GatedMLP}
"""What a block computes, by `Block.kind`."""


class DecoderLayer(nn.Module):
    """The blocks of a layer, each on the normalised hidden states and added back to them, with its bottleneck."""

    def __init__(self, make: Make, layer: int) -> None:
        super().__init__()
        blocks = make.spec.layout.blocks
        self.norms = nn.ModuleList(make.norm(make.spec.hidden_size) for _ in blocks)
        self.blocks = nn.ModuleList(BLOCKS[block.kind](make, layer, block) for block in blocks)
        self.bottlenecks = [bottleneck_site(make.rows, make.spec.layout, layer, block) for block in blocks]

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden [T, H] to [T, H]; the input is left as it was."""
        for norm, block, site in zip(self.norms, self.blocks, self.bottlenecks, strict=True):
            hidden = hidden + add_bottleneck(block(norm(hidden), context), hidden, site, context.lora)
        return hidden


class Decoder(nn.Module):
    """The frozen base model.

    `forward` is `embed`, then every layer of `layers`, then `finish`; callers that do something between two layers
    (training yields there) run the same parts themselves. `logits` is separate because only some rows need it.

    Attributes:
        spec: its shape.
        device: where the weights lie.
        dtype: the compute type.
        layers: `DecoderLayer`s, called as `layer(hidden, context)`.
        embed_tokens, lm_head: [V, H]; one and the same where the two are tied.
        stack: the same weights as the CPU's kernels take them, for executors that compute there; None if not packed.
        team: threads of the CPU's kernels, for whatever else the step does there; None is the calling thread.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        read: Callable[[Matrix], Weight] | None = None,
    ) -> None:
        """A decoder whose matrices `read` gives; without it they are dense and hold anything."""
        super().__init__()
        make_first_calls()
        device = torch.device(device)
        self.spec = spec
        self.device, self.dtype = device, dtype
        make = Make(spec, table_rows(spec), read or partial(Dense.empty, dtype=dtype, device=device), dtype, device)
        self.embed_tokens = make.read(spec.embedding)
        self.layers = nn.ModuleList(DecoderLayer(make, layer) for layer in range(spec.num_layers))
        self.norm = make.norm(spec.hidden_size)
        self.lm_head = self.embed_tokens if spec.tie_word_embeddings else make.read(spec.head)
        self.rotary = Rotary(spec, dtype=dtype, device=device)
        self.stack: PackedStack | None = None
        self.team: Team | None = None

    def weights(self) -> Iterator[Weight]:
        """Every matrix, each once."""
        yield self.embed_tokens
        if self.lm_head is not self.embed_tokens:
            yield self.lm_head
        for module in self.modules():
            if isinstance(module, Projection):
                yield module.weight

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is frozen."""
        vectors = sum(parameter.nbytes for parameter in self.parameters())
        return vectors + sum(weight.nbytes for weight in self.weights())

    def rope(self, positions: Tensor, lengths: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin [T, head_dim] for `ForwardContext.rope`; see `Rotary.table` for `lengths`."""
        return self.rotary.table(positions, lengths)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Hidden states [T, H] of the tokens [T]."""
        return self.embed_tokens.rows(input_ids)

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm: [T, H] to [T, H]."""
        return self.norm(hidden)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 [n, V] of finished hidden states [n, H]."""
        return self.lm_head.multiply(hidden).float()

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states [T, H] after the final norm."""
        return self.states(input_ids, context, (-1,))[0]

    def states(self, input_ids: Tensor, context: ForwardContext, layers: Sequence[int]) -> Sequence[Tensor]:
        """Hidden states [T, H] of several depths.

        Args:
            input_ids: [T].
            context: of the pass.
            layers: -1 is after the final norm, -2 what goes into the last layer, -3 into the one before it; as
                transformers counts its `hidden_states`.
        """
        last = deque([self.embed(input_ids)], maxlen=-min(layers))
        for layer in self.layers:
            last.append(layer(last[-1], context))
        last[-1] = self.finish(last[-1])
        return [last[layer] for layer in layers]
