"""Adapters in training: float32 masters and gradients of all of them in one flat arena.

The modules of an adapter lie back to back, so that its weights, gradient and moments are each one vector, and a step on
one adapter touches no other one's bytes. The arena is made anew when an adapter comes or goes, between two passes; a
`TrainedAdapter` knows where its own part is then.

Where the base computes in a two-byte type, passes read a copy of the masters in that type, as mixed-precision training
does (Micikevicius et al. 2018): products of two-byte operands run on the tensor cores, float32 ones beside them do not.
The copy has the values that the adapter will be served with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.adapters.head_files import HeadTensors
from tenora.adapters.peft_format import write_files
from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.table_rows import RowKind, TableRows
from tenora.adapters.targets import TargetModule
from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.model.magnitudes import RowNorms
from tenora.training.kinds.kind import Files
from tenora.training.kinds.table import find_kind
from tenora.training.spec import LoraSpec
from tenora_kernels.flags import EPILOGUE
from tenora_kernels.layout import LoraTables

Float32Array = npt.NDArray[np.float32]

HEAD_RATE = 10.0
"""Times the rate of the low-rank terms: a head begins at zero, and not as something that is nearly right."""


class Base:
    """A base as far as adapters depend on it, see `tenora.training.kinds.kind.Base`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, spec = decoder, decoder.spec
        self.row_norms = RowNorms(decoder)
        self.family, self.vocabulary = spec.family, spec.vocab_size
        self.heads, self.kv_heads = spec.num_heads, spec.num_kv_heads

    def embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings [n, H] of tokens [n]."""
        return self._decoder.embed(tokens.to(self._decoder.device))


class TrainingArena:
    """Master weights and gradients of the adapters that train on one base.

    Attributes:
        masters: the weights in float32, which optimizers change.
        tables: what `add_lora` reads weights from, in the type of the base, and adds float32 gradients to; the masters
            themselves where that type is float32. Both are replaced by `add` and `remove`, which must not be called
            while a pass is under way.
    """

    def __init__(
        self,
        rows: TableRows,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        base: Base | None = None,
    ) -> None:
        """An empty arena on `device` for a base with these rows that computes in `dtype`.

        Args:
            base: what kinds of adapters need to know of it beside its rows; None if none of those comes.
        """
        self.rows, self.base = rows, base
        self._device, self._dtype = device, dtype
        self._adapters: list[TrainedAdapter] = []
        self.masters, self.tables = self._allocate([])

    def __len__(self) -> int:
        return len(self._adapters)

    def add(self, lora: LoraSpec, ranks: Sequence[int] | None = None, *, heads: int = 0) -> TrainedAdapter:
        """Make room for an adapter; all its weights are zero.

        Args:
            lora: its shape.
            ranks: per row; None: `lora`'s in every module that it names.
            heads: rows of its heads.

        Raises:
            TrainingError: it names no module of the base, or has a rank below 1.
            MemoryError, torch.OutOfMemoryError: there is no room; the others are as they were.
        """
        adapter = TrainedAdapter(self, lora, ranks, heads)
        self._rebuild([*self._adapters, adapter])
        return adapter

    def reshape(self, adapter: TrainedAdapter, ranks: Sequence[int]) -> None:
        """Give an adapter other ranks; its weights are zero afterwards. Raises as `add`, and the adapter is gone."""
        self.remove(adapter)
        adapter.take_ranks(ranks)
        self._rebuild([*self._adapters, adapter])

    def remove(self, adapter: TrainedAdapter) -> None:
        """Free the room of an adapter."""
        self._rebuild([other for other in self._adapters if other is not adapter])

    def _rebuild(self, adapters: list[TrainedAdapter]) -> None:
        """Lay these adapters side by side in a new arena. Nothing has changed if memory runs out."""
        masters, tables = self._allocate(adapters)
        spans: list[slice] = []
        start = 0
        for adapter in adapters:
            span = slice(start, start + adapter.numel)
            if adapter in self._adapters:
                masters.arena[span] = adapter.weights
                _gradient(tables)[span] = adapter.grad
            spans.append(span)
            start = span.stop
        if tables is not masters:
            tables.arena.copy_(masters.arena)
        self.masters, self.tables, self._adapters = masters, tables, adapters
        for slot, (adapter, span) in enumerate(zip(adapters, spans, strict=True)):
            adapter.slot, adapter.span = slot, span

    def _allocate(self, adapters: Sequence[TrainedAdapter]) -> tuple[LoraTables, LoraTables]:
        """Masters and what passes read, all zero."""
        arena = torch.zeros(sum(adapter.numel for adapter in adapters), dtype=torch.float32, device=self._device)
        grad = torch.zeros_like(arena)
        masters = self._tables(adapters, arena, grad)
        if self._dtype == torch.float32:
            return masters, masters
        return masters, self._tables(adapters, arena.to(self._dtype), grad)

    def _tables(self, adapters: Sequence[TrainedAdapter], arena: Tensor, grad: Tensor) -> LoraTables:
        tables = LoraTables.empty(
            arena,
            in_features=self.rows.in_features,
            out_features=self.rows.out_features,
            slots=max(len(adapters), 1),
            grad=grad,
            low_rank_rows=self.rows.low_rank,
        )
        start = 0
        for slot, adapter in enumerate(adapters):
            scales = [adapter.scaling] * len(adapter.ranks)
            start += tables.place(slot, start, adapter.ranks, scales, flags=adapter.flags)
        return tables


class TrainedAdapter:
    """One adapter of an arena.

    Attributes:
        kept_checkpoints: latest ones that stay beside the best.
        lora: its shape.
        kind: which kind it is.
        ranks: per row of the base; 0 for those it does not fill.
        scaling: of its low-rank terms.
        flags: of its slot, see `LoraTables`.
        prefix, prompt: virtual tokens whose keys and values, or embeddings, it learns.
        numel: number of its weights.
        first_layer: the first layer that it changes; their number if it changes none.
        slot: its column in the arena's tables, until the next `add` or `remove`.
        span: where its weights lie in the arena, until then.
    """

    kept_checkpoints = 3
    flags = prefix = prompt = 0

    def __init__(
        self, arena: TrainingArena, lora: LoraSpec, ranks: Sequence[int] | None = None, heads: int = 0
    ) -> None:
        self.lora = lora
        self.kind = find_kind(lora.type)
        self._arena = arena
        self.slot, self.span = -1, slice(0, 0)
        ranks = self.kind.ranks(arena.rows, lora) if ranks is None else list(ranks)
        if heads:
            ranks[self.head_row] = heads
        self.take_ranks(ranks)
        self.scaling = self.kind.scaling(lora)

    def take_ranks(self, ranks: Sequence[int]) -> None:
        """For the arena alone, which lays it out anew: have these ranks, per row."""
        rows = self._arena.rows
        self.ranks = list(ranks)
        self.flags = self.kind.flags(self.lora) | rows.flags(self.ranks)
        self.numel = rows.numel(self.ranks)
        self.prefix, self.prompt = (
            max((self.ranks[row] for row in rows.of(kind)), default=0) for kind in (RowKind.PREFIX, RowKind.PROMPT)
        )
        layers = (rows.layer(row) for row, rank in enumerate(self.ranks) if rank)
        self.first_layer = min((layer for layer in layers if layer is not None), default=len(rows.layers))

    @property
    def tables(self) -> LoraTables:
        """The arena's tables of now."""
        return self._arena.tables

    @property
    def rows(self) -> TableRows:
        """Those of the base."""
        return self._arena.rows

    @property
    def has_epilogue(self) -> bool:
        """Whether it has scales or bottlenecks."""
        return bool(self.flags & EPILOGUE)

    @property
    def weights(self) -> Tensor:
        """float32 [numel], a view of the master weights. Whoever changes them calls `refresh` afterwards."""
        return self._arena.masters.arena[self.span]

    @property
    def grad(self) -> Tensor:
        """float32 [numel], a view of the gradient."""
        return _gradient(self.tables)[self.span]

    @property
    def rates(self) -> list[tuple[slice, float]]:
        """Stretches for `AdamW`, which together are all weights: B learns faster than A by LoRA+'s ratio, and heads
        `HEAD_RATE` times as fast.
        """
        ratio, heads = self.lora.lora_plus_ratio, self.filled(RowKind.HEAD)
        if ratio == 1 and not heads:
            return []
        found, start = [], 0
        for place, (rank, row) in enumerate(zip(self.ranks, self._arena.rows.rows, strict=True)):
            first = HEAD_RATE if place in heads else 1.0
            for size, times in ((rank * row.in_features, first), (rank * row.out_features, ratio)):
                if size:
                    found.append((slice(start, start + size), times))
                    start += size
        return found

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what passes read up to date with the master weights."""
        self.kind.derive(self)
        if self.tables is not self._arena.masters:
            self.tables.arena[self.span].copy_(self.weights)

    @property
    def base(self) -> Base:
        """The base's weights. TrainingError if the arena was made without."""
        if self._arena.base is None:
            raise TrainingError(f"The arena was built without the base, which {self.kind.name} depends on.")
        return self._arena.base

    def filled(self, kind: RowKind) -> list[int]:
        """The rows of a kind that it fills."""
        return [row for row in self._arena.rows.of(kind) if self.ranks[row]]

    def a(self, row: int) -> Tensor:
        """View of the masters of A, [r, in], in a row of the base."""
        return self._arena.masters.a(row, self.slot)

    def bt(self, row: int) -> Tensor:
        """View of the masters of Bᵀ, [r, out]."""
        return self._arena.masters.bt(row, self.slot)

    @property
    def head_row(self) -> int:
        """The row of the tables that its heads lie in, one below the other."""
        return self._arena.rows.row(RowKind.HEAD)

    @property
    def head(self) -> Tensor:
        """float32 [k, H], a view of its heads' master weights. Whoever changes them calls `refresh` afterwards."""
        return self._arena.masters.a(self.head_row, self.slot)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set the weights so that the adapter begins as the base; see its kind.

        Numbers come from a generator of its own: equal seeds give equal weights, and no global state moves.
        """
        self.kind.initialise(self, torch.Generator().manual_seed(seed))
        self.refresh()

    def begin_as(self, directions: Mapping[int, Tensor]) -> None:
        """Set A of each of these rows, [rank, in], and B zero."""
        for row, a in directions.items():
            self._arena.masters.a(row, self.slot).copy_(a)
            self._arena.masters.bt(row, self.slot).zero_()
        self.refresh()

    def files(self, base_model: str) -> Files:
        """The adapter as it is written: the fields of its configuration, and tensors by name.

        Args:
            base_model: id of the base.
        """
        return self.kind.files(self, base_model)

    def grad_a(self, row: int) -> Tensor:
        """View of the gradient of A, [r, in]."""
        return self.tables.grad_a(row, self.slot)

    def matrices(self, kind: RowKind, *, transposed_b: bool = False) -> dict[str, Float32Array]:
        """A of the rows of a kind, or their Bᵀ, by path: float32 copies on the host."""
        view = self.bt if transposed_b else self.a
        return {self.rows.rows[row].path: view(row).cpu().numpy().copy() for row in self.filled(kind)}

    def start_from(self, modules: Mapping[str, tuple[Float32Array, Float32Array, float]]) -> None:
        """Begin as another adapter does, after `initialise`.

        A higher rank keeps the function: the further rows of A stay random and the further columns of B zero. A module
        that the other one lacks begins as the base. A scaling that differs is multiplied into B.

        Args:
            modules: by path, A [r, in], B [out, r] and the scaling that the other adapter is served with.

        Raises:
            TrainingError: the other adapter has a module or ranks that this one has no room for.
        """
        own = {target.path: target for target in self._modules()}
        if missing := sorted(modules.keys() - own.keys()):
            raise TrainingError(
                f"The starting adapter has {missing[0]}, which is not among the target modules; keep all of its "
                "modules.",
                code="init_from_mismatch",
            )
        for path, (a, b, scale) in modules.items():
            target = own[path]
            rank = a.shape[0]
            if rank > self.ranks[target.row]:
                raise TrainingError(
                    f"The starting adapter has rank {rank} at {path}; train with a rank of at least that.",
                    code="init_from_mismatch",
                )
            self._arena.masters.a(target.row, self.slot)[:rank].copy_(torch.from_numpy(a))
            bt = torch.from_numpy(np.ascontiguousarray(b.T)).mul(scale / self.scaling)
            self._arena.masters.bt(target.row, self.slot)[:rank].copy_(bt)
        self.refresh()

    def export(self) -> dict[str, tuple[Float32Array, Float32Array]]:
        """The adapter per module path: A [r, in] and B [out, r], float32 copies on the host."""
        return {
            target.path: (
                self._arena.masters.a(target.row, self.slot).cpu().numpy().copy(),
                np.ascontiguousarray(self._arena.masters.bt(target.row, self.slot).t().cpu().numpy()),
            )
            for target in self._modules()
        }

    def write(self, directory: Path, *, base_model: str, heads: HeadTensors | None = None) -> None:
        """Write it as it is now, with its heads, as a PEFT directory; raises as `write_files`."""
        write_files(directory, *self.files(base_model), heads=heads)

    def prepared(self) -> PreparedAdapter:
        """A copy of the adapter as it is now, on the arena's device and in the base's type, for a slot that serves."""
        return PreparedAdapter(
            values=self.tables.arena[self.span].clone(),
            ranks=tuple(self.ranks),
            scaling=tuple(self.scaling if rank else 0.0 for rank in self.ranks),
            flags=self.flags,
            invocation=self.lora.invocation,
        )

    def remove(self) -> None:
        """Free its room; the adapter is of no use afterwards."""
        self._arena.remove(self)

    def _modules(self) -> list[TargetModule]:
        return [module for module in self._arena.rows.modules if self.ranks[module.row]]


def _gradient(tables: LoraTables) -> Tensor:
    if tables.grad is None:
        raise TrainingError("The arena was built without gradients.")
    return tables.grad
