"""Frozen weights packed for the kernels of the CPU, in a `Decoder` whose modules otherwise stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tenora.model.spec import ModelSpec
from tenora_kernels.cpu.decoder.stack import PackedLayer, PackedStack, packable
from tenora_kernels.cpu.products.gemm import PackedMatrix, matmul, unpack
from tenora_kernels.cpu.runtime.team import Team

if TYPE_CHECKING:  # the decoder's modules use this one
    from tenora.model.decoder import Decoder

__all__ = ["PackedLinear", "can_pack", "pack_stack"]


class PackedLinear:
    """x · Wᵀ with a packed, frozen W: float32 [T, K] to [T, N]; gradients flow to x."""

    def __init__(self, matrix: PackedMatrix, team: Team) -> None:
        self.matrix = matrix
        self.team = team

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [T, K] to [T, N]."""
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]  # torch
        return product


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return matmul(x, linear.matrix, linear.team)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # W is unpacked once for all the rows: little beside the product, and no second copy stays in memory.
        return dy @ unpack(ctx.linear.matrix, ctx.linear.team), None


def can_pack(spec: ModelSpec) -> bool:
    """Whether the kernels take a base of these sizes."""
    return packable(
        hidden=spec.hidden_size,
        q_size=spec.q_size,
        kv_size=spec.kv_size,
        mlp=spec.intermediate_size,
        head_dim=spec.head_dim,
        activation=spec.hidden_act,
    )


def pack_stack(decoder: Decoder, matrices: Mapping[str, PackedMatrix], team: Team) -> PackedStack:
    """The whole decoder for `PackedStack.run`. `matrices`: packed, by the names of the decoder's parameters."""
    spec = decoder.spec
    table = matrices["embed_tokens"]
    return PackedStack(
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        mlp=spec.intermediate_size,
        activation=spec.hidden_act,
        eps=spec.rms_norm_eps,
        table=table,
        head=matrices.get("lm_head", table),
        layers=[_layer(decoder, matrices, index) for index in range(spec.num_layers)],
        final_norm=decoder.norm.weight,
        team=team,
    )


def _layer(decoder: Decoder, matrices: Mapping[str, PackedMatrix], index: int) -> PackedLayer:
    prefix = f"layers.{index}"
    vectors = dict(decoder.named_parameters())
    return PackedLayer(
        qkv=matrices[f"{prefix}.self_attn.qkv_proj.weight"],
        o=matrices[f"{prefix}.self_attn.o_proj.weight"],
        gate_up=matrices[f"{prefix}.mlp.gate_up_proj.weight"],
        down=matrices[f"{prefix}.mlp.down_proj.weight"],
        input_norm=vectors[f"{prefix}.input_layernorm.weight"],
        mlp_norm=vectors[f"{prefix}.post_attention_layernorm.weight"],
        qkv_bias=vectors.get(f"{prefix}.self_attn.qkv_proj.bias"),
        o_bias=vectors.get(f"{prefix}.self_attn.o_proj.bias"),
        gate_up_bias=vectors.get(f"{prefix}.mlp.gate_up_proj.bias"),
        down_bias=vectors.get(f"{prefix}.mlp.down_proj.bias"),
        qk_norm=vectors.get(f"{prefix}.self_attn.qk_norm.weight"),
        window=decoder.spec.sliding_window[index],
    )
