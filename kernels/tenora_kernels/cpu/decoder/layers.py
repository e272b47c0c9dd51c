"""Layers of a packed decoder over one training stream, forward and backward: a call from Python for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenora_kernels.cpu.attention import sequences as attention
from tenora_kernels.cpu.attention.attention import Rope
from tenora_kernels.cpu.attention.sequences import QUERIES
from tenora_kernels.cpu.decoder import layer_record as record
from tenora_kernels.cpu.decoder import step
from tenora_kernels.cpu.decoder.activation import ACTIVATIONS
from tenora_kernels.cpu.decoder.layer_backward import BACKWARD_PHASES, backward_layer
from tenora_kernels.cpu.decoder.layer_forward import FORWARD_PHASES, forward_layer
from tenora_kernels.cpu.decoder.stack import PackedStack
from tenora_kernels.cpu.decoder.stream import lay_out_rows, lay_out_sequences
from tenora_kernels.cpu.lowrank import factors as low_rank
from tenora_kernels.cpu.products.gemm import NARROW, WIDE
from tenora_kernels.cpu.products.strided import WIDTH, times_address
from tenora_kernels.cpu.runtime.workspace import Workspace, cut
from tenora_kernels.layout import LoraBatch

__all__ = ["Kept", "StreamLayers", "takes", "warm_up"]


class Kept:
    """What a layer's backward pass needs. `give_back` returns its memory; the layer's output lies there, too.

    Attributes:
        hidden: the layer's input, float32 [T, hidden].
    """

    def __init__(self, hidden: Tensor, block: Tensor, places: dict[int, int], workspace: Workspace) -> None:
        self.hidden = hidden
        self.places = places
        self._block: Tensor | None = block
        self._workspace = workspace

    def give_back(self) -> None:
        """Free it; only once."""
        if self._block is not None:
            self._workspace.give(self._block)
            self._block = None


def takes(stack: PackedStack, lora: LoraBatch | None) -> bool:
    """Whether the compiled layers take a decoder and the adapters of a stream."""
    if stack.head_dim % WIDTH or 3 * stack.head_dim > QUERIES * 2 * WIDTH:
        return False
    if lora is None:
        return True
    tables, slots = lora.tables, lora.segments.arrays.seg_slot
    floats = tables.arena.dtype == torch.float32 and tables.arena.device.type == "cpu"
    return floats and not tables.narrow[slots].any()


def warm_up(stack: PackedStack) -> None:
    """Compile both jobs, or read the compiled code from the cache on disk."""
    rope = Rope(torch.ones(1, stack.head_dim), torch.zeros(1, stack.head_dim))
    layers = StreamLayers(stack, [0, 1], None, rope, None)
    out, kept = layers.forward(0, torch.zeros(1, stack.table.in_features))
    layers.backward(0, kept, out, need_dx=True)
    kept.give_back()


class StreamLayers:
    """A stream's way through the layers.

    Args:
        stack: the decoder.
        cu_seqlens, prefixes: its sequences, see `stream.lay_out_sequences`. No window may be shorter than one of them.
        rope: cos and sin of its tokens, float32 [T, D].
        lora: the adapters of its rows, as `takes` wants them; must not change between the two passes.
    """

    def __init__(
        self,
        stack: PackedStack,
        cu_seqlens: Sequence[int],
        prefixes: Sequence[tuple[int, int] | None] | None,
        rope: Rope,
        lora: LoraBatch | None,
    ) -> None:
        self._stack, self._workspace = stack, stack.workspace
        self._rope = Rope(*(table.contiguous() for table in rope))
        self._lora = lora
        self._tokens = int(cu_seqlens[-1])
        self._hidden = stack.table.in_features
        q, kv = stack.heads * stack.head_dim, stack.kv_heads * stack.head_dim
        self._q, self._qkv = q, q + 2 * kv
        widths = ((q, kv, kv), (self._hidden,), (stack.mlp, stack.mlp), (self._hidden,))
        self._sequences = lay_out_sequences(cu_seqlens, prefixes)
        self._rows = lay_out_rows(self._tokens, lora, widths, (self._hidden, q, self._hidden, stack.mlp))
        self._factors = self._factor_record()
        self._scale = np.float32(1 / sqrt(stack.head_dim))
        self._sample = NARROW if stack.table.narrow else WIDE

    def forward(self, index: int, hidden: Tensor) -> tuple[Tensor, Kept]:
        """Layer `index`: its output float32 [T, hidden], and what its backward pass needs.

        The output is valid until `give_back` of the second.
        """
        tokens = self._tokens
        hidden = hidden.contiguous()
        sizes = {
            record.OUT: tokens * self._hidden, record.QKV: tokens * self._qkv, record.ATTENDED: tokens * self._q,
            record.MID: tokens * self._hidden, record.GATE_UP: tokens * 2 * self._stack.mlp,
            record.S: tokens * self._rows.columns, -1: self._stack.heads * tokens,
        }  # fmt: skip
        block, places = cut(sizes, self._workspace.take)
        places[record.X] = hidden.data_ptr()
        kept = Kept(hidden, block, places, self._workspace)
        if tokens:
            layer, heads, packs = self._records(index, kept, backward=False)
            self._stack.team.run(
                forward_layer, FORWARD_PHASES, layer, heads, self._sequences.table, self._sequences.items,
                self._sequences.places, self._factors, self._rows.sites, packs, self._rows.slots, self._rows.pieces,
                np.float32(self._stack.eps), self._scale, self._sample,
            )  # fmt: skip
        return block[: tokens * self._hidden].view(tokens, self._hidden), kept

    def backward(self, index: int, kept: Kept, d_out: Tensor, *, need_dx: bool) -> Tensor | None:
        """Add dA and dBᵀ of layer `index` to `tables.grad`; the gradient of its input if `need_dx`."""
        d_out = d_out.contiguous()
        dx = torch.empty(self._tokens, self._hidden) if need_dx else None
        if self._tokens:
            layer, heads, packs = self._records(index, kept, backward=True)
            layer[record.D_OUT] = d_out.data_ptr()
            layer[record.DX] = 0 if dx is None else dx.data_ptr()
            rows, sequences = self._rows, self._sequences
            self._stack.team.run(
                backward_layer, BACKWARD_PHASES, layer, heads, sequences.table, sequences.members, sequences.families,
                sequences.places, self._factors, rows.sites, packs, rows.slots, rows.pieces, rows.runs, rows.bounds,
                np.float32(self._stack.eps), self._scale, self._sample,
            )  # fmt: skip
        return dx

    def _factor_record(self) -> NDArray[np.int64]:
        values = np.zeros(low_rank.FACTORS_SIZE, np.int64)
        if self._lora is not None:
            tables = self._lora.tables
            ranks, scaling, a_offset, b_offset, _, slots = tables.record.values
            grad = 0 if tables.grad is None else tables.grad.data_ptr()
            values[:7] = ranks, scaling, a_offset, b_offset, slots, tables.arena.data_ptr(), grad
        values[low_rank.S_STEP], values[low_rank.TIMES] = 4 * self._rows.columns, times_address()
        return values

    def _records(
        self, index: int, kept: Kept, *, backward: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The arrays `layer`, `attention` and `packs` of a job."""
        stack, tokens, sequences = self._stack, self._tokens, self._sequences
        q, kv, mlp, hidden = tokens * self._q, tokens * stack.kv_heads * stack.head_dim, stack.mlp, self._hidden
        turned = sequences.panels * WIDTH * stack.kv_heads * stack.head_dim
        scores = 2 * QUERIES * sequences.score_columns * stack.team.size
        normed, active, packs_at, own = record.NORMED, record.ACTIVE, -2, -100
        sizes = {normed: tokens * hidden, active: tokens * mlp, packs_at: self._rows.packed}
        heads = {attention.Q: q, attention.KEYS_TURNED: turned, attention.SCORES: scores}
        if backward:
            sizes |= {
                record.D_MID: tokens * hidden, record.D_NORMED: tokens * hidden, record.D_GATE_UP: tokens * 2 * mlp,
                record.D_ATTENDED: q, record.D_QKV: tokens * self._qkv, record.DS: tokens * self._rows.columns,
                record.TURNED_QKV: self._qkv * hidden, record.TURNED_O: self._q * hidden,
                record.TURNED_GATE_UP: 2 * mlp * hidden, record.TURNED_DOWN: hidden * mlp,
            }  # fmt: skip
            heads |= {attention.VALUES_TURNED: turned, attention.KEYS: kv, attention.DQ: q}
            heads |= {attention.DK: q, attention.DV: q}
        else:
            heads |= {attention.VALUES: kv}
        _, places = cut(sizes | {own - key: size for key, size in heads.items()}, self._workspace.scratch)
        layer = self._layer_record(index)
        for key, place in (places | kept.places).items():
            if key >= 0:
                layer[key] = place
        call = self._attention_record(index, kept)
        for key in heads:
            call[key] = places[own - key]
        if backward:
            call[attention.D_OUT], call[attention.D_QKV] = layer[record.D_ATTENDED], layer[record.D_QKV]
        return layer, call, self._rows.offsets * 4 + places[packs_at]

    def _layer_record(self, index: int) -> NDArray[np.int64]:
        layer = np.zeros(record.RECORD_SIZE, np.int64)
        stack = self._stack
        layer[: record.X] = (
            self._tokens, self._hidden, stack.mlp, ACTIVATIONS[stack.activation], index, len(self._rows.slots),
            stack.team.size, stack.heads,
        )  # fmt: skip
        weights = stack.records[index]
        layer[record.INPUT_NORM : record.RECORD_SIZE] = weights[
            [
                step.INPUT_NORM, step.QKV_WEIGHT, step.QKV_BIAS, step.O_WEIGHT, step.O_BIAS, step.MLP_NORM,
                step.GATE_UP_WEIGHT, step.GATE_UP_BIAS, step.DOWN_WEIGHT, step.DOWN_BIAS,
            ]
        ]  # fmt: skip
        return layer

    def _attention_record(self, index: int, kept: Kept) -> NDArray[np.int64]:
        call, stack = np.zeros(attention.ATTENTION_SIZE, np.int64), self._stack
        call[attention.TOKENS], call[attention.DIM] = self._tokens, stack.head_dim
        call[attention.HEADS], call[attention.KV_HEADS] = stack.heads, stack.kv_heads
        call[attention.PANELS] = self._sequences.panels
        call[attention.QKV], call[attention.OUT] = kept.places[record.QKV], kept.places[record.ATTENDED]
        call[attention.LOG_SUM] = kept.places[-1]
        call[attention.COS], call[attention.SIN] = self._rope.cos.data_ptr(), self._rope.sin.data_ptr()
        call[attention.NORM] = stack.records[index][step.QK_NORM]
        call[attention.SCORES_ROW], call[attention.TIMES] = self._sequences.score_columns, times_address()
        return call
