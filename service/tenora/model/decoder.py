"""The frozen decoder of the dense Llama family: the same modules serve and train.

Tokens of any number of sequences lie in one stream [T]; which belong together is the attention's business. Pre-norm
blocks, RMSNorm, rotary positions, grouped-query attention and a gated MLP (Touvron et al. 2023), with the variants of
Mistral (sliding window), Qwen2 (q, k, v biases) and Qwen3 (normalised q and k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenora.model.attention import PagedAttention
from tenora.model.context import ForwardContext
from tenora.model.packed import PackedLinear
from tenora.model.projection import LayerSites, Projection, lora_sites
from tenora.model.rotary import Rotary, rotate
from tenora.model.spec import ModelSpec
from tenora_kernels.cpu.attention import attention
from tenora_kernels.cpu.attention.attention import PagedStep, Rope, takes
from tenora_kernels.cpu.decoder import layers, losses
from tenora_kernels.cpu.decoder.stack import PackedStack
from tenora_kernels.cpu.lowrank import lora
from tenora_kernels.cpu.runtime.team import Team

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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


class SelfAttention(nn.Module):
    """Grouped-query attention of one layer with fused q, k and v."""

    def __init__(
        self, spec: ModelSpec, layer: int, sites: LayerSites, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.window = spec.sliding_window[layer]
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.qkv_proj = Projection(sites.qkv, bias=spec.attention_bias, dtype=dtype, device=device)
        self.o_proj = Projection(sites.o, bias=spec.o_bias, dtype=dtype, device=device)
        # q heads and k heads are normalised together: one row of weights per head.
        self.qk_norm = (
            RMSNorm((spec.num_heads + spec.num_kv_heads, spec.head_dim), spec.rms_norm_eps, dtype=dtype, device=device)
            if spec.qk_norm
            else None
        )

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden [T, H] to [T, H]."""
        qkv = self.qkv_proj(hidden, context)
        if isinstance(context.attention, PagedAttention) and not torch.is_grad_enabled():
            norm, eps = (None, 0.0) if self.qk_norm is None else (self.qk_norm.weight, self.qk_norm.eps)
            attended = context.attention.attend_qkv(self.layer, qkv, context.rope, self.window, norm=norm, eps=eps)
            return self.o_proj(attended, context)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        qkv = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        qk, v = torch.split(qkv, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = torch.split(rotate(qk, *context.rope), [self.num_heads, self.num_kv_heads], dim=1)
        attended = context.attention.attend(self.layer, q, k, v, self.window)
        return self.o_proj(attended, context)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) with gate and up fused."""

    def __init__(
        self, spec: ModelSpec, sites: LayerSites, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        super().__init__()
        self.gate_up_proj = Projection(sites.gate_up, bias=spec.mlp_bias, dtype=dtype, device=device)
        self.down_proj = Projection(sites.down, bias=spec.mlp_bias, dtype=dtype, device=device)
        self.activation = _ACTIVATIONS[spec.hidden_act]

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden [T, H] to [T, H]."""
        gate, up = self.gate_up_proj(hidden, context).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up, context)  # type: ignore[no-any-return]  # untyped __call__


class DecoderLayer(nn.Module):
    """One block: attention and MLP, each on the normalised hidden states and added back to them."""

    def __init__(
        self, spec: ModelSpec, layer: int, sites: LayerSites, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        super().__init__()
        norm = partial(RMSNorm, (spec.hidden_size,), spec.rms_norm_eps, dtype=dtype, device=device)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(spec, layer, sites, dtype=dtype, device=device)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(spec, sites, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        """Map hidden [T, H] to [T, H]; the input is left as it was."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), context)
        mlp: Tensor = self.mlp(self.post_attention_layernorm(hidden), context)
        return hidden + mlp


class Decoder(nn.Module):
    """The frozen base model.

    `forward` is `embed`, then every layer of `layers`, then `finish`; callers that do something between two layers
    (training yields there) run the same parts themselves. `logits` is separate because only some rows need it.

    Attributes:
        spec: its shape.
        device: where the weights lie.
        dtype: the compute type.
        layers: `DecoderLayer`s, called as `layer(hidden, context)`.
        stack: the same weights packed for the CPU's kernels; None if they are not packed. A forward pass for serving
            then runs there as a whole, and the modules remain for training.
        team: threads of the CPU's kernels, for whatever else the step does there; None is the calling thread.
    """

    embed_tokens: nn.Parameter  # neither is there if the weights are packed: the stack holds them
    lm_head: nn.Parameter

    def __init__(
        self, spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.spec = spec
        self.device, self.dtype = device, dtype
        table = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self.embed_tokens = nn.Parameter(table, requires_grad=False)
        self.layers = nn.ModuleList(
            DecoderLayer(spec, layer, sites, dtype=dtype, device=device) for layer, sites in enumerate(lora_sites(spec))
        )
        self.norm = RMSNorm((spec.hidden_size,), spec.rms_norm_eps, dtype=dtype, device=device)
        head = self.embed_tokens
        if not spec.tie_word_embeddings:
            head = nn.Parameter(torch.empty_like(table), requires_grad=False)
        self.lm_head = head
        self.rotary = Rotary(spec, dtype=dtype, device=device)
        self.stack: PackedStack | None = None
        self.team: Team | None = None

    def rope(self, positions: Tensor, lengths: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin [T, head_dim] for `ForwardContext.rope`; see `Rotary.table` for `lengths`."""
        return self.rotary.table(positions, lengths)

    def warm_up(self, *, train: bool) -> None:
        """Compile what the CPU's kernels do for this decoder, or read it from their cache: no request shall wait.

        Args:
            train: what training needs, too.
        """
        if self.device.type != "cpu":
            return
        if self.stack is not None:
            self.stack.warm_up(train=train)
            if train and layers.takes(self.stack, None):
                layers.warm_up(self.stack)
                losses.warm_up(self.stack)
        elif takes(self.dtype, self.spec.head_dim):
            attention.warm_up(self.dtype)
        if train or self.stack is None:
            lora.warm_up(self.dtype, train=train)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Hidden states [T, H] of the tokens [T]."""
        if self.stack is not None:
            return self.stack.table.rows(input_ids)
        return F.embedding(input_ids, self.embed_tokens)

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm: [T, H] to [T, H]."""
        return self.norm(hidden)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 [n, V] of finished hidden states [n, H]."""
        if self.stack is not None:
            return PackedLinear(self.stack.head, self.stack.team)(hidden)
        return F.linear(hidden, self.lm_head).float()

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states [T, H] after the final norm."""
        if self.stack is not None and (step := _for_the_stack(context)) is not None:
            return self.stack.run(input_ids, Rope(*context.rope), *step, context.lora)
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, context)
        return self.finish(hidden)


def _for_the_stack(context: ForwardContext) -> tuple[PagedStep, tuple[Sequence[Tensor], Sequence[Tensor]]] | None:
    """Attention and caches, if a packed stack can run the step: for serving, with rows that lie as it wants them."""
    attention = context.attention
    if torch.is_grad_enabled() or context.lora_dropout is not None or not isinstance(attention, PagedAttention):
        return None
    if attention.step is None or not PackedStack.takes(context.lora):
        return None
    return attention.step, attention.caches
