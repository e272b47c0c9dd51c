"""A decoder's packed weights as the `PackedStack` that the CPU's kernels run as a whole."""

from __future__ import annotations

from typing import Any

from tenora.model.decoder import Decoder
from tenora.model.spec import ModelSpec
from tenora.model.weights.base import Weight
from tenora.model.weights.packed import Packed
from tenora_kernels.cpu.decoder.stack import PackedLayer, PackedStack, supports_sizes
from tenora_kernels.cpu.products.gemm import PackedMatrix
from tenora_kernels.cpu.runtime.team import Team

__all__ = ["can_pack", "pack_stack"]

_BLOCKS = ("attention", "gated_mlp")
"""What the kernels compute in a layer, whatever the modules of its sites."""


def can_pack(spec: ModelSpec) -> bool:
    """Whether the kernels take a base of this shape and these sizes."""
    if tuple(block.kind for block in spec.layout.blocks) != _BLOCKS:
        return False
    return supports_sizes(
        hidden=spec.hidden_size,
        q_size=spec.q_size,
        kv_size=spec.kv_size,
        mlp=spec.intermediate_size,
        head_dim=spec.head_dim,
        activation=spec.hidden_act,
    )


def pack_stack(decoder: Decoder, team: Team) -> PackedStack:
    """The whole decoder for `PackedStack.run`; its weights must be packed, its shape one that `can_pack` takes."""
    spec = decoder.spec
    layers: list[Any] = list(decoder.layers)
    attention, mlp = layers[0].blocks
    return PackedStack(
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        mlp=spec.intermediate_size,
        activation=spec.hidden_act,
        eps=spec.rms_norm_eps,
        table=_matrix(decoder.embed_tokens),
        head=_matrix(decoder.lm_head),
        layers=[_layer(layer, spec.sliding_window[index]) for index, layer in enumerate(layers)],
        sites=[product.site for product in (attention.qkv, attention.o, mlp.gate_up, mlp.down)],
        bottlenecks=layers[0].bottlenecks,
        final_norm=decoder.norm.weight,
        team=team,
    )


def _layer(layer: Any, window: int | None) -> PackedLayer:
    (input_norm, mlp_norm), (attention, mlp) = layer.norms, layer.blocks
    return PackedLayer(
        qkv=_matrix(attention.qkv.weight),
        o=_matrix(attention.o.weight),
        gate_up=_matrix(mlp.gate_up.weight),
        down=_matrix(mlp.down.weight),
        input_norm=input_norm.weight,
        mlp_norm=mlp_norm.weight,
        qkv_bias=attention.qkv.bias,
        o_bias=attention.o.bias,
        gate_up_bias=mlp.gate_up.bias,
        down_bias=mlp.down.bias,
        qk_norm=None if attention.head_norm is None else attention.head_norm.weight,
        window=window,
    )


def _matrix(weight: Weight) -> PackedMatrix:
    if not isinstance(weight, Packed):
        raise TypeError(f"the stack needs packed weights, not {type(weight).__name__}.")
    return weight.matrix
