"""A decoder of the dense Llama family, packed for `step.run_step`: from tensors to hidden states, one call a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenora_kernels.cpu.attention import paged
from tenora_kernels.cpu.attention.attention import UNLIMITED, PagedStep, Rope, allocate_cache, takes
from tenora_kernels.cpu.decoder import step
from tenora_kernels.cpu.decoder.activation import ACTIVATIONS
from tenora_kernels.cpu.lowrank import lowrank
from tenora_kernels.cpu.products.gemm import NARROW, PANEL, WIDE, PackedMatrix, matmul, unpack
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.cpu.runtime.workspace import Workspace
from tenora_kernels.layout import LoraBatch

__all__ = ["PackedLayer", "PackedStack", "packable"]

_Integers = NDArray[np.int64]
_NO_PIECES: _Integers = np.zeros((0, 3), np.int64)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The frozen weights of one layer. Vectors are float32; what a model lacks is None.

    Attributes:
        qkv, o, gate_up, down: the projections.
        qkv_bias, o_bias, gate_up_bias, down_bias: of their outputs.
        input_norm, mlp_norm: [hidden].
        qk_norm: [Hq + Hkv, D].
        window: positions that a token sees, itself included; None is all.
    """

    qkv: PackedMatrix
    o: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    input_norm: Tensor
    mlp_norm: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    qk_norm: Tensor | None = None
    window: int | None = None

    def record(self) -> list[int]:
        """The layer's row of the array `layers`, without a cache."""
        row = [0] * step.LAYER_SIZE
        places = {
            step.INPUT_NORM: self.input_norm, step.MLP_NORM: self.mlp_norm, step.QK_NORM: self.qk_norm,
            step.QKV_WEIGHT: self.qkv.panels, step.QKV_BIAS: self.qkv_bias,
            step.O_WEIGHT: self.o.panels, step.O_BIAS: self.o_bias,
            step.GATE_UP_WEIGHT: self.gate_up.panels, step.GATE_UP_BIAS: self.gate_up_bias,
            step.DOWN_WEIGHT: self.down.panels, step.DOWN_BIAS: self.down_bias,
        }  # fmt: skip
        for place, tensor in places.items():
            row[place] = 0 if tensor is None else tensor.data_ptr()
        row[step.WINDOW] = UNLIMITED if self.window is None else self.window
        return row


def packable(*, hidden: int, q_size: int, kv_size: int, mlp: int, head_dim: int, activation: str) -> bool:
    """Whether `PackedStack` takes a decoder of these sizes: every module has whole panels of PANEL columns."""
    whole = all(size % PANEL == 0 for size in (hidden, q_size, kv_size, mlp))
    return whole and takes(torch.float32, head_dim) and activation in ACTIVATIONS


@dataclass(slots=True)
class PackedStack:
    """Embedding, layers, final norm and head. `run` and `logits` are for one thread at a time.

    Attributes:
        heads, kv_heads, head_dim, mlp: sizes.
        activation: of the gate, a name in ACTIVATIONS.
        eps: of every norm.
        table: the embedding.
        head: the output projection; the table itself where the two are tied.
        layers: in order.
        final_norm: float32 [hidden].
        team: who computes.
        workspace: buffers of training passes.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    activation: str
    eps: float
    table: PackedMatrix
    head: PackedMatrix
    layers: Sequence[PackedLayer]
    final_norm: Tensor
    team: Team
    workspace: Workspace = field(default_factory=Workspace, repr=False)
    _layers: _Integers = field(init=False, repr=False)
    _slices: tuple[_Integers, _Integers, _Integers] = field(init=False, repr=False)
    _keys: Sequence[Tensor] | None = field(init=False, repr=False, default=None)  # whose addresses `_layers` holds

    def __post_init__(self) -> None:
        matrices = [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if any(matrix.narrow != self.table.narrow for matrix in [*matrices, self.head]):
            raise ValueError("the matrices of a decoder must be packed alike, all of them bfloat16 or all float32.")
        self._layers = np.array([layer.record() for layer in self.layers], dtype=np.int64)
        q, kv, hidden = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.table.in_features
        self._slices = (
            np.array([(0, q), (q, kv), (q + kv, kv)]),
            np.array([(0, hidden)]),
            np.array([(0, self.mlp), (self.mlp, self.mlp)]),
        )

    def run(
        self,
        ids: Tensor,
        rope: Rope,
        attention: PagedStep,
        caches: tuple[Sequence[Tensor], Sequence[Tensor]],
        lora: LoraBatch | None,
    ) -> Tensor:
        """Hidden states after the final norm, float32 [T, hidden].

        Args:
            ids: int64 [T], tokens of all sequences, one after the other.
            rope: cos and sin of the tokens, float32.
            attention: which tokens belong together.
            caches: keys and values of every layer, from `attention.allocate_cache`, float32; changed in place.
            lora: adapters of the rows. Its rows must be as `takes` wants them.

        Raises:
            ValueError: `takes(lora)` is false.
        """
        rows, hidden = ids.shape[0], self.table.in_features
        if rows == 0:
            return torch.empty(0, hidden)
        q_size = self.heads * self.head_dim
        qkv_size = q_size + 2 * self.kv_heads * self.head_dim
        x, normed, attended = (torch.empty(rows, size) for size in (hidden, hidden, q_size))
        qkv, gate_up = torch.empty(rows, qkv_size), torch.empty(rows, 2 * self.mlp)
        tables, pieces, base_rows, rank = self._adapters(lora, rows)
        buffer_size = lowrank.ITEM_ROWS * rank
        buffers = torch.empty(self.team.size, buffer_size)
        numbers = np.arange(rows)
        record = np.array(
            (
                rows, base_rows, len(self.layers), hidden, self.heads, self.kv_heads, self.head_dim, self.mlp,
                ACTIVATIONS[self.activation], ids.data_ptr(), self.table.panels.data_ptr(), len(self.table.panels),
                x.data_ptr(), normed.data_ptr(), qkv.data_ptr(), attended.data_ptr(), gate_up.data_ptr(),
                buffers.data_ptr(), buffer_size * 4, self.final_norm.data_ptr(), len(pieces), numbers.ctypes.data,
            ),
            dtype=np.int64,
        )  # fmt: skip
        if caches[0] is not self._keys:
            self._layers[:, step.KEYS] = [keys.data_ptr() for keys in caches[0]]
            self._layers[:, step.VALUES] = [values.data_ptr() for values in caches[1]]
            self._keys = caches[0]
        plan = attention.plan(self.heads, self.kv_heads, self.head_dim, self.team)
        q, item = qkv.data_ptr(), 4 * self.head_dim
        plan.call[: paged.NORM] = (
            q, q + self.heads * item, q + (self.heads + self.kv_heads) * item, qkv_size * 4, attended.data_ptr(),
            rope.cos.data_ptr(), rope.sin.data_ptr(),
        )  # fmt: skip
        plan.call[paged.BLOCK_SIZE] = caches[0][0].shape[1]
        self.team.run(
            step.run_step, step.PHASES_PER_LAYER * len(self.layers) + step.MORE_PHASES, record, self._layers, tables,
            pieces, *self._slices, plan.call, attention.slots, attention.tables, plan.items, plan.panels,
            self.team.size, plan.scale, np.float32(self.eps), NARROW if self.table.narrow else WIDE,
        )  # fmt: skip
        return normed

    @property
    def records(self) -> _Integers:
        """int64 [layers, step.LAYER_SIZE]: addresses of the layers' weights, for other jobs of the team."""
        return self._layers

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 [n, vocabulary] of hidden states [n, hidden]."""
        return matmul(hidden, self.head, self.team)

    def warm_up(self, *, train: bool) -> None:
        """Compile, or read the compiled code from the cache on disk: seconds that the first request would wait.

        Args:
            train: what gradients need, too.
        """
        dim = self.head_dim
        caches = allocate_cache(1, 16, self.kv_heads, dim, torch.float32)
        rope = Rope(torch.ones(1, dim), torch.zeros(1, dim))
        count = len(self.layers)
        everything = ((caches[0],) * count, (caches[1],) * count)
        hidden = self.run(torch.zeros(1, dtype=torch.int64), rope, PagedStep([0], [0, 1], [1], [[0]]), everything, None)
        self.logits(hidden)
        if train:
            unpack(self.layers[0].o, self.team)

    @staticmethod
    def takes(lora: LoraBatch | None) -> bool:
        """Whether the adapters' rows lie as a step needs them: base rows first, then slot after slot, in float32."""
        if lora is None or not lora.segments.adapted:
            return True
        segments = lora.segments
        whole = segments.first is not None and segments.first + segments.adapted == segments.rows
        return whole and lora.tables.arena.dtype == torch.float32

    def _adapters(self, lora: LoraBatch | None, rows: int) -> tuple[_Integers, _Integers, int, int]:
        """The array `lora` of `lowrank`, the batch's pieces, the rows before its adapted ones, its largest rank."""
        if lora is None or not lora.segments.adapted:
            return np.zeros(lowrank.LORA_SIZE, np.int64), _NO_PIECES, rows, 0
        if not self.takes(lora):
            raise ValueError("rows must lie with those of the base first, then slot after slot, in float32 tables.")
        segments, tables = lora.segments, lora.tables
        record = np.append(tables.record.values, tables.arena.data_ptr())
        first = segments.first or 0
        slots = segments.arrays.seg_slot
        return record, _pieces(segments.arrays.seg_ptr + first, slots), first, int(tables.arrays.ranks[:, slots].max())


def _pieces(bounds: _Integers, slots: _Integers) -> _Integers:
    """Segments cut into at most ITEM_ROWS rows each: int64 [n, 3] of slot, first row and number of rows."""
    counts = np.diff(bounds)
    pieces = -(-counts // lowrank.ITEM_ROWS)
    if len(slots) == pieces.sum():
        return np.stack((slots, bounds[:-1], counts), axis=1)
    segment = np.repeat(np.arange(len(slots)), pieces)
    ordinal = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = bounds[segment] + ordinal * lowrank.ITEM_ROWS
    stop = np.minimum(start + lowrank.ITEM_ROWS, bounds[segment + 1])
    return np.stack((slots[segment], start, stop - start), axis=1)
