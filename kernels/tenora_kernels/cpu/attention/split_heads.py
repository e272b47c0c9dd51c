"""From the rows of a fused q, k, v projection to the heads that `sequences` attends with, and back from gradients.

Rotary positions in the halves layout of Hugging Face's weights; an RMSNorm of each head of q and k before them where
the model has one.
"""

from __future__ import annotations

from numba import float32

from tenora_kernels.cpu.products.rowwise import add_row, norm_backward, norm_forward, scale_row
from tenora_kernels.cpu.products.strided import WIDTH
from tenora_kernels.cpu.runtime.compiled import compiled
from tenora_kernels.cpu.runtime.values import load, store

__all__ = ["join_token", "split_token"]


@compiled()
def _rotate(x, cos, sin, dim, out):
    half = dim // 2
    for i in range(half):
        a, b = load(x, i, float32(0)), load(x, half + i, float32(0))
        store(out, i, a * load(cos, i, float32(0)) - b * load(sin, i, float32(0)), float32(0))
        store(out, half + i, b * load(cos, half + i, float32(0)) + a * load(sin, half + i, float32(0)), float32(0))


@compiled()
def _rotate_back(x, cos, sin, dim, out):
    half = dim // 2
    for i in range(half):
        a, b = load(x, i, float32(0)), load(x, half + i, float32(0))
        store(out, i, a * load(cos, i, float32(0)) + b * load(sin, half + i, float32(0)), float32(0))
        store(out, half + i, b * load(cos, half + i, float32(0)) - a * load(sin, i, float32(0)), float32(0))


@compiled()
def _write_lines(x, head, token, attention, out):
    """A token's head as lines of [kv heads, D / WIDTH, T, WIDTH]."""
    tokens, dim = attention.tokens, attention.dim
    for i in range(dim):
        line = (head * (dim // WIDTH) + i // WIDTH) * tokens + token
        store(out, line * WIDTH + i % WIDTH, load(x, i, float32(0)), float32(0))


@compiled()
def _write_column(x, head, place, attention, out):
    """A token's head as a column of [kv heads, panels, D, WIDTH]."""
    dim = attention.dim
    start = (head * attention.panels + place // WIDTH) * dim * WIDTH + place % WIDTH
    for i in range(dim):
        store(out, start + i * WIDTH, load(x, i, float32(0)), float32(0))


@compiled()
def split_token(attention, token, place, back, eps, scale, buffer):
    """Heads of one token: Q (times `scale`), KEYS_TURNED and VALUES; with `back` KEYS and VALUES_TURNED.

    Args:
        attention: `sequences.ATTENTION`.
        token: which.
        place: panel · WIDTH + column of its keys.
        back: for the backward pass.
        eps: of the norm of q and k.
        scale: of the scores.
        buffer: address of 2 · D float32.
    """
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.dim
    row = attention.qkv + token * (heads + 2 * kv_heads) * dim * 4
    cos, sin = attention.cos + token * dim * 4, attention.sin + token * dim * 4
    rotated = buffer + dim * 4
    for head in range(heads + kv_heads):
        source = row + head * dim * 4
        if attention.norm != 0:
            norm_forward(source, attention.norm + head * dim * 4, dim, eps, buffer)
            source = buffer
        _rotate(source, cos, sin, dim, rotated)
        if head < heads:
            scale_row(rotated, scale, dim, attention.q + (head * attention.tokens + token) * dim * 4)
        else:
            _write_column(rotated, head - heads, place, attention, attention.transposed_keys)
            if back:
                _write_lines(rotated, head - heads, token, attention, attention.keys)
    for head in range(kv_heads):
        source = row + (heads + kv_heads + head) * dim * 4
        if back:
            _write_column(source, head, place, attention, attention.transposed_values)
        else:
            _write_lines(source, head, token, attention, attention.values)


@compiled()
def _group_sum(attention, gradient, kv_head, token, out):
    """The gradient of a key head: the sum over the query heads that share it."""
    dim, group = attention.dim, attention.heads // attention.kv_heads
    first = gradient + (kv_head * group * attention.tokens + token) * dim * 4
    scale_row(first, float32(1), dim, out)
    for other in range(1, group):
        add_row(out, first + other * attention.tokens * dim * 4, dim, out)


@compiled()
def join_token(attention, token, eps, buffer):
    """D_QKV of one token from DQ, DK and DV; arguments as those of `split_token`."""
    heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.dim
    row_size = (heads + 2 * kv_heads) * dim * 4
    row, out = attention.qkv + token * row_size, attention.d_qkv + token * row_size
    cos, sin = attention.cos + token * dim * 4, attention.sin + token * dim * 4
    rotated = buffer + dim * 4
    for head in range(heads + kv_heads):
        at = head * dim * 4
        source = attention.dq + (head * attention.tokens + token) * dim * 4
        if head >= heads:
            _group_sum(attention, attention.dk, head - heads, token, buffer)
            source = buffer
        if attention.norm != 0:
            _rotate_back(source, cos, sin, dim, rotated)
            norm_backward(row + at, attention.norm + at, rotated, dim, eps, out + at)
        else:
            _rotate_back(source, cos, sin, dim, out + at)
    for head in range(kv_heads):
        _group_sum(attention, attention.dv, head, token, out + (heads + kv_heads + head) * dim * 4)
