"""Layers of a packed decoder over one training stream, forward and backward: a call from Python for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenora_kernels.cpu.attention.attention import Rope
from tenora_kernels.cpu.attention.sequences import ATTENTION, BACKWARD_ONLY, FORWARD_ONLY, QUERIES
from tenora_kernels.cpu.decoder.activation import ACTIVATIONS
from tenora_kernels.cpu.decoder.layer_arguments import BACKWARD, FORWARD
from tenora_kernels.cpu.decoder.layer_backward import BACKWARD_PHASES, backward_layer
from tenora_kernels.cpu.decoder.layer_forward import FORWARD_PHASES, forward_layer
from tenora_kernels.cpu.decoder.stack import PackedStack
from tenora_kernels.cpu.decoder.stream import lay_out_rows, lay_out_sequences
from tenora_kernels.cpu.lowrank.factors import COUNT, FACTORS
from tenora_kernels.cpu.products.gemm import BF16_PANELS, FLOAT32_PANELS
from tenora_kernels.cpu.products.strided import WIDTH, times_address
from tenora_kernels.cpu.runtime.arguments import arguments
from tenora_kernels.cpu.runtime.workspace import Workspace, cut
from tenora_kernels.flags import EPILOGUE
from tenora_kernels.layout import LoraBatch

__all__ = ["Kept", "StreamLayers", "supports", "warm_up"]


class Kept:
    """What a layer's backward pass needs. `give_back` returns its memory; the layer's output lies there, too.

    Attributes:
        hidden: the layer's input, float32 [T, hidden].
    """

    def __init__(self, hidden: Tensor, block: Tensor, places: dict[str, int], workspace: Workspace) -> None:
        self.hidden = hidden
        self.places = places
        self._block: Tensor | None = block
        self._workspace = workspace

    def give_back(self) -> None:
        """Free it; only once."""
        if self._block is not None:
            self._workspace.give(self._block)
            self._block = None


def supports(stack: PackedStack, lora: LoraBatch | None) -> bool:
    """Whether the compiled layers take a decoder and the adapters of a stream."""
    if stack.head_dim % WIDTH or 3 * stack.head_dim > QUERIES * 2 * WIDTH:
        return False
    if lora is None:
        return True
    if lora.flags & EPILOGUE:
        return False
    tables, slots = lora.tables, lora.segments.arrays.seg_slot
    floats = tables.arena.dtype == torch.float32 and tables.arena.device.type == "cpu"
    return floats and not tables.is_bf16[slots].any()


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
        lora: the adapters of its rows, as `supports` wants them; must not change between the two passes.
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
        self._q, self._kv, self._qkv = q, kv, q + 2 * kv
        self._sequences = lay_out_sequences(cu_seqlens, prefixes)
        self._rows = lay_out_rows(self._tokens, lora, stack.sites, len(stack.layers))
        self._factors = self._factor_arguments()
        self._scale = np.float32(1 / sqrt(stack.head_dim))
        self._sample = BF16_PANELS if stack.table.is_bf16 else FLOAT32_PANELS

    def forward(self, index: int, hidden: Tensor) -> tuple[Tensor, Kept]:
        """Layer `index`: its output float32 [T, hidden], and what its backward pass needs.

        The output is valid until `give_back` of the second.
        """
        tokens, mlp = self._tokens, self._stack.mlp
        hidden = hidden.contiguous()
        sizes = {
            "out": tokens * self._hidden, "qkv": tokens * self._qkv, "attended": tokens * self._q,
            "mid": tokens * self._hidden, "gate_up": tokens * 2 * mlp, "s": tokens * self._rows.columns,
            "log_sum": self._stack.heads * tokens,
        }  # fmt: skip
        block, places = cut(sizes, self._workspace.take)
        kept = Kept(hidden, block, places | {"x": hidden.data_ptr()}, self._workspace)
        if tokens:
            scratch = self._scratch(values=tokens * self._kv)
            layer = arguments(FORWARD, self._sizes(index), kept.places, scratch, self._weights(index))
            heads = self._heads(index, kept, scratch, dict.fromkeys(BACKWARD_ONLY, 0))
            self._stack.team.run(
                forward_layer, FORWARD_PHASES, layer, heads, self._sequences.table, self._sequences.items,
                self._sequences.places, self._factors, self._rows.sites, self._packs(scratch), self._rows.slots,
                self._rows.pieces, np.float32(self._stack.eps), self._scale, self._sample,
            )  # fmt: skip
        return block[: tokens * self._hidden].view(tokens, self._hidden), kept

    def backward(self, index: int, kept: Kept, d_out: Tensor, *, need_dx: bool) -> Tensor | None:
        """Add dA and dBᵀ of layer `index` to `tables.grad`; the gradient of its input if `need_dx`."""
        d_out = d_out.contiguous()
        tokens, mlp, hidden = self._tokens, self._stack.mlp, self._hidden
        dx = torch.empty(tokens, hidden) if need_dx else None
        if tokens:
            q = tokens * self._q
            scratch = self._scratch(
                transposed_values=self._transposed, keys=tokens * self._kv, dq=q, dk=q, dv=q, d_attended=q,
                d_qkv=tokens * self._qkv, d_mid=tokens * hidden, d_normed=tokens * hidden, d_gate_up=tokens * 2 * mlp,
                ds=tokens * self._rows.columns, transposed_qkv=self._qkv * hidden, transposed_o=self._q * hidden,
                transposed_gate_up=2 * mlp * hidden, transposed_down=hidden * mlp,
            )  # fmt: skip
            layer = arguments(
                BACKWARD, self._sizes(index), kept.places, scratch, self._weights(index),
                d_out=d_out.data_ptr(), dx=0 if dx is None else dx.data_ptr(),
            )  # fmt: skip
            given = {"d_out": scratch["d_attended"], **dict.fromkeys(FORWARD_ONLY, 0)}
            heads, rows, sequences = self._heads(index, kept, scratch, given), self._rows, self._sequences
            self._stack.team.run(
                backward_layer, BACKWARD_PHASES, layer, heads, sequences.table, sequences.members, sequences.families,
                sequences.places, self._factors, rows.sites, self._packs(scratch), rows.slots, rows.pieces, rows.runs,
                rows.bounds, np.float32(self._stack.eps), self._scale, self._sample,
            )  # fmt: skip
        return dx

    def _factor_arguments(self) -> NDArray[np.void]:
        tables = None if self._lora is None else self._lora.tables
        nothing = dict.fromkeys(FACTORS.names or (), 0)
        return arguments(
            FACTORS, nothing if tables is None else tables.addresses._asdict(),
            arena=0 if tables is None else tables.arena.data_ptr(),
            grad=0 if tables is None or tables.grad is None else tables.grad.data_ptr(),
            s_step=4 * self._rows.columns, times=times_address(), modules=int(self._rows.sites[:, COUNT].sum()),
        )  # fmt: skip

    @property
    def _transposed(self) -> int:
        """Floats of the keys, or the values, of all sequences in panels."""
        return self._sequences.panels * WIDTH * self._kv

    def _scratch(self, **sizes: int) -> dict[str, int]:
        """Addresses of buffers that are free again after the job: those of either direction, and `sizes` floats."""
        tokens, stack = self._tokens, self._stack
        both = {
            "normed": tokens * self._hidden, "active": tokens * stack.mlp, "packs": self._rows.packed,
            "q": tokens * self._q, "transposed_keys": self._transposed,
            "scores": 2 * QUERIES * self._sequences.score_columns * stack.team.size,
        }  # fmt: skip
        return cut(both | sizes, self._workspace.scratch)[1]

    def _packs(self, scratch: dict[str, int]) -> NDArray[np.int64]:
        """The array `packs` of `factors`."""
        return self._rows.offsets * 4 + scratch["packs"]

    def _sizes(self, index: int) -> dict[str, int]:
        stack = self._stack
        return {
            "rows": self._tokens, "hidden": self._hidden, "mlp": stack.mlp, "activation": ACTIVATIONS[stack.activation],
            "index": index, "slots": len(self._rows.slots), "members": stack.team.size, "head_count": stack.heads,
        }  # fmt: skip

    def _weights(self, index: int) -> dict[str, int]:
        names = self._stack.layer_arguments.dtype.names or ()
        return dict(zip(names, self._stack.layer_arguments[index], strict=True))

    def _heads(self, index: int, kept: Kept, scratch: dict[str, int], given: dict[str, int]) -> NDArray[np.void]:
        """The argument `attention` of a job; `given` comes first."""
        stack = self._stack
        return arguments(
            ATTENTION, given, scratch,
            tokens=self._tokens, dim=stack.head_dim, heads=stack.heads, kv_heads=stack.kv_heads,
            panels=self._sequences.panels, qkv=kept.places["qkv"], out=kept.places["attended"],
            log_sum=kept.places["log_sum"], cos=self._rope.cos.data_ptr(), sin=self._rope.sin.data_ptr(),
            norm=stack.layer_arguments[index]["qk_norm"], scores_row=self._sequences.score_columns,
            times=times_address(),
        )  # fmt: skip
