"""A decoder of the dense Llama family, packed for `step.run_step`: from tensors to hidden states, one call a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenora_kernels.cpu.attention.attention import UNLIMITED, PagedStep, Rope, allocate_cache, supports
from tenora_kernels.cpu.decoder import step
from tenora_kernels.cpu.decoder.activation import ACTIVATIONS
from tenora_kernels.cpu.lowrank import lowrank
from tenora_kernels.cpu.lowrank.factors import COUNT, site_table
from tenora_kernels.cpu.products.gemm import BF16_PANELS, FLOAT32_PANELS, PANEL, PackedMatrix, matmul, unpack
from tenora_kernels.cpu.runtime.arguments import arguments, assign
from tenora_kernels.cpu.runtime.team import Team
from tenora_kernels.cpu.runtime.workspace import Workspace
from tenora_kernels.flags import EPILOGUE
from tenora_kernels.layout import BottleneckSite, LoraBatch, LoraSite, LoraTables

__all__ = ["PackedLayer", "PackedStack", "supports_sizes"]

_Integers = NDArray[np.int64]
_NO_PIECES: _Integers = np.zeros((0, 3), np.int64)
_NO_ADAPTERS = np.zeros(1, lowrank.LORA)


class _Adapted(NamedTuple):
    """The adapters of a step's rows, as `step.run_step` takes them.

    Attributes:
        tables: the argument `lora` of `lowrank`.
        pieces: of the batch, int64 [n, 3].
        slots_of_rows: int64 [rows].
        base_rows: rows before the first one that has an adapter.
        plain_rows, plain_items: rows and pieces before the first one whose adapter has an epilogue.
        highest_rank: of their low-rank terms and bottlenecks.
    """

    tables: NDArray[np.void]
    pieces: _Integers
    slots_of_rows: _Integers
    base_rows: int
    plain_rows: int
    plain_items: int
    highest_rank: int


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

    def arguments(self) -> NDArray[np.void]:
        """The layer's entry of the array `layers` as an array [1], without a cache."""
        tensors = {
            "input_norm": self.input_norm, "mlp_norm": self.mlp_norm, "qk_norm": self.qk_norm,
            "qkv_weight": self.qkv.panels, "qkv_bias": self.qkv_bias,
            "o_weight": self.o.panels, "o_bias": self.o_bias,
            "gate_up_weight": self.gate_up.panels, "gate_up_bias": self.gate_up_bias,
            "down_weight": self.down.panels, "down_bias": self.down_bias,
        }  # fmt: skip
        addresses = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
        window = UNLIMITED if self.window is None else self.window
        return arguments(step.LAYER, **addresses, keys=0, values=0, window=window)


def supports_sizes(*, hidden: int, q_size: int, kv_size: int, mlp: int, head_dim: int, activation: str) -> bool:
    """Whether `PackedStack` takes a decoder of these sizes: every module has whole panels of PANEL columns."""
    whole = all(size % PANEL == 0 for size in (hidden, q_size, kv_size, mlp))
    return whole and supports(torch.float32, head_dim) and activation in ACTIVATIONS


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
        sites: of the first layer: qkv, o, gate_up and down.
        bottlenecks: of the first layer: after attention and after the MLP. Those of the next layers have the next rows.
            None: no adapter has any, nor a scale.
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
    sites: Sequence[LoraSite]
    final_norm: Tensor
    team: Team
    bottlenecks: Sequence[BottleneckSite] | None = None
    workspace: Workspace = field(default_factory=Workspace, repr=False)
    _layers: NDArray[np.void] = field(init=False, repr=False)
    _sites: _Integers = field(init=False, repr=False)
    _keys: Sequence[Tensor] | None = field(init=False, repr=False, default=None)  # whose addresses `_layers` holds

    def __post_init__(self) -> None:
        matrices = [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if any(matrix.is_bf16 != self.table.is_bf16 for matrix in [*matrices, self.head]):
            raise ValueError("the matrices of a decoder must be packed alike, all of them bfloat16 or all float32.")
        self._layers = np.concatenate([layer.arguments() for layer in self.layers])
        first = self.layers[0]
        for site, matrix in zip(self.sites, (first.qkv, first.o, first.gate_up, first.down), strict=True):
            if (site.in_features, site.slices[-1][1]) != (matrix.in_features, matrix.out_features):
                raise ValueError("a layer's sites must have the columns of its matrices.")
        self._sites = site_table(self.sites)

    def run(
        self,
        ids: Tensor,
        rope: Rope,
        attention: PagedStep,
        caches: tuple[Sequence[Tensor], Sequence[Tensor]],
        lora: LoraBatch | None,
        taps: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, float32 [T, hidden].

        Args:
            ids: int64 [T], tokens of all sequences, one after the other.
            rope: cos and sin of the tokens, float32.
            attention: which tokens belong together.
            caches: keys and values of every layer, from `attention.allocate_cache`, float32; changed in place.
            lora: adapters of the rows, which lie with those of the base first, then slot after slot, those whose
                adapters have scales or bottlenecks last; see `supports`.
            taps: float32 [n, T, hidden], n ≤ layers, to be filled with what goes into each of the last n layers.

        Raises:
            ValueError: the rows or the tables lie otherwise.
        """
        rows, hidden = ids.shape[0], self.table.in_features
        if rows == 0:
            return torch.empty(0, hidden)
        q_size = self.heads * self.head_dim
        qkv_size = q_size + 2 * self.kv_heads * self.head_dim
        x, normed, attended = (torch.empty(rows, size) for size in (hidden, hidden, q_size))
        qkv, gate_up = torch.empty(rows, qkv_size), torch.empty(rows, 2 * self.mlp)
        adapted = self._adapters(lora, rows)
        residual = torch.empty(rows - adapted.plain_rows, hidden)
        buffer_size = lowrank.ITEM_ROWS * adapted.highest_rank
        buffers = torch.empty(self.team.size, buffer_size)
        numbers = np.arange(rows)
        whole = arguments(
            step.STEP, self._epilogues,
            rows=rows, base_rows=adapted.base_rows, layers=len(self.layers), hidden=hidden, heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.head_dim, mlp=self.mlp, activation=ACTIVATIONS[self.activation],
            ids=ids.data_ptr(), table=self.table.panels.data_ptr(), x=x.data_ptr(), normed=normed.data_ptr(),
            qkv=qkv.data_ptr(), attended=attended.data_ptr(), gate_up=gate_up.data_ptr(), buffers=buffers.data_ptr(),
            buffer_step=buffer_size * 4, final_norm=self.final_norm.data_ptr(),
            items=len(adapted.pieces), numbers=numbers.ctypes.data, modules=int(self._sites[:, COUNT].sum()),
            plain_rows=adapted.plain_rows, plain_items=adapted.plain_items,
            slots_of_rows=adapted.slots_of_rows.ctypes.data, residual=residual.data_ptr(),
            taps=0 if taps is None else taps.data_ptr(),
            first_tap=len(self.layers) - (0 if taps is None else len(taps)),
        )  # fmt: skip
        if caches[0] is not self._keys:
            self._layers["keys"] = [keys.data_ptr() for keys in caches[0]]
            self._layers["values"] = [values.data_ptr() for values in caches[1]]
            self._keys = caches[0]
        plan = attention.plan(self.heads, self.kv_heads, self.head_dim, self.team)
        q, item = qkv.data_ptr(), 4 * self.head_dim
        assign(
            plan.call,
            q=q, k=q + self.heads * item, v=q + (self.heads + self.kv_heads) * item, stride=qkv_size * 4,
            out=attended.data_ptr(), cos=rope.cos.data_ptr(), sin=rope.sin.data_ptr(),
            block_size=caches[0][0].shape[1],
        )  # fmt: skip
        self.team.run(
            step.run_step, step.PHASES_PER_LAYER * len(self.layers) + step.MORE_PHASES, whole, self._layers,
            adapted.tables, adapted.pieces, self._sites, plan.call, attention.kv_slots, attention.tables, plan.items,
            plan.panels, self.team.size, plan.scale, np.float32(self.eps),
            BF16_PANELS if self.table.is_bf16 else FLOAT32_PANELS,
        )  # fmt: skip
        return normed

    @property
    def layer_arguments(self) -> NDArray[np.void]:
        """`step.LAYER` [layers]: addresses of the layers' weights, for other jobs of the team."""
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
    def supports(tables: LoraTables) -> bool:
        """Whether a step can read adapters from such tables."""
        return tables.arena.dtype == torch.float32 and tables.arena.device.type == "cpu"

    def _adapters(self, lora: LoraBatch | None, rows: int) -> _Adapted:
        if lora is None or not lora.segments.adapted:
            return _Adapted(_NO_ADAPTERS, _NO_PIECES, _NO_PIECES, rows, rows, 0, 0)
        segments, tables = lora.segments, lora.tables
        first, slots = segments.first, segments.arrays.seg_slot
        ends = tables.flags[slots] & EPILOGUE != 0
        plain = len(slots) - int(ends.sum())
        lies = first is not None and first + segments.adapted == segments.rows and not ends[:plain].any()
        if first is None or not lies or not self.supports(tables):
            raise ValueError("rows must lie with those of the base first, then slot after slot, in float32 tables.")
        if plain < len(slots) and self.bottlenecks is None:
            raise ValueError("this decoder's adapters have neither scales nor bottlenecks.")
        bounds = segments.arrays.seg_ptr + first
        pieces = _pieces(bounds, slots)
        return _Adapted(
            arguments(lowrank.LORA, tables.addresses._asdict(), arena=tables.arena.data_ptr()),
            pieces,
            np.repeat(np.append(-1, slots), np.diff(bounds, prepend=0)),
            base_rows=first,
            plain_rows=int(bounds[plain]),
            plain_items=int(np.searchsorted(pieces[:, 1], bounds[plain])),
            highest_rank=int(tables.arrays.ranks[: tables.low_rank_rows, slots].max()),
        )

    @property
    def _epilogues(self) -> dict[str, int]:
        """Rows in the tables of the first layer's first scale, bottleneck and biases of it."""
        if self.bottlenecks is None:
            return dict.fromkeys(("scales", "bottlenecks", "outer_biases", "inner_biases"), 0)
        first = self.bottlenecks[0]
        return {
            "scales": self.sites[0].scale_row or 0, "bottlenecks": first.row,
            "outer_biases": first.outer_row, "inner_biases": first.inner_row,
        }  # fmt: skip


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
