"""Names of what a layer's training jobs read: the array `layer`, and the phases that the two jobs share."""

from __future__ import annotations

# Addresses in bytes; rows of float32 of the sizes in brackets. SAVED by the forward pass for the backward pass: X, QKV,
# ATTENDED, MID, GATE_UP and S.
(
    ROWS, HIDDEN, MLP, ACTIVATION, INDEX, SLOTS, MEMBERS, HEAD_COUNT,
    X, MID, QKV, ATTENDED, GATE_UP, S, OUT, NORMED, ACTIVE,
    D_OUT, DX, D_MID, D_NORMED, D_GATE_UP, D_ATTENDED, D_QKV, DS,
    TURNED_QKV, TURNED_O, TURNED_GATE_UP, TURNED_DOWN,
    INPUT_NORM, QKV_WEIGHT, QKV_BIAS, O_WEIGHT, O_BIAS, MLP_NORM, GATE_UP_WEIGHT, GATE_UP_BIAS, DOWN_WEIGHT, DOWN_BIAS,
    RECORD_SIZE,
) = range(40)  # fmt: skip
"""ROWS: T. INDEX: of the layer. SLOTS: adapters in the stream. MEMBERS: threads. HEAD_COUNT: query heads.

X, MID, OUT [hidden]: hidden states before, between and after attention and MLP. ACTIVE [mlp]: act(gate) · up. DX: 0 if
nobody wants the gradient of X. TURNED: the four matrices as `transposed` turns them.
"""

SITE_QKV, SITE_O, SITE_GATE_UP, SITE_DOWN = range(4)

TOKENS_OF_A_TASK = 16
"""Tokens whose heads one task splits."""

__all__ = [name for name in dir() if name.isupper()]
