"""What a layer's training jobs read, and what the two share.

Addresses lead to rows of float32 of the sizes in brackets: x, mid, out [hidden], the hidden states before, between and
after attention and MLP; active [mlp], act(gate) · up. The forward pass saves x, qkv, attended, mid, gate_up and s for
the backward pass. transposed_…: the four matrices as `products.transposed` lays them. index: of the layer; slots:
adapters in the stream; members: threads; head_count: query heads.
"""

from __future__ import annotations

from tenora_kernels.cpu.runtime.arguments import declare

__all__ = [
    "BACKWARD", "FORWARD", "SITE_DOWN", "SITE_GATE_UP", "SITE_O", "SITE_QKV", "TOKENS_OF_A_TASK",
]  # fmt: skip

_SIZES = ("rows", "hidden", "mlp", "activation", "index", "slots", "members", "head_count")
_SAVED = ("x", "mid", "attended", "gate_up", "s")
_MADE_AGAIN = ("normed", "active")
_WEIGHTS = ("input_norm", "qkv_weight", "o_weight", "mlp_norm", "gate_up_weight", "down_weight")

FORWARD = declare(
    *_SIZES, *_SAVED, *_MADE_AGAIN, *_WEIGHTS, "qkv", "out", "qkv_bias", "o_bias", "gate_up_bias", "down_bias"
)
"""A bias that does not exist is 0."""

BACKWARD = declare(
    *_SIZES, *_SAVED, *_MADE_AGAIN, *_WEIGHTS, "d_out", "dx", "d_mid", "d_normed", "d_gate_up", "d_attended", "d_qkv",
    "ds", "transposed_qkv", "transposed_o", "transposed_gate_up", "transposed_down",
)  # fmt: skip
"""dx: 0 if nobody wants the gradient of x."""

SITE_QKV, SITE_O, SITE_GATE_UP, SITE_DOWN = range(4)

TOKENS_OF_A_TASK = 16
"""Tokens whose heads one task splits."""
