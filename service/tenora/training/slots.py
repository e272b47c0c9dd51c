"""Adapters in training: float32 masters and gradients of every slot in one flat arena.

A slot's modules lie back to back, so that its weights, gradient and moments are each one vector, and a step on one slot
touches no other slot's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenora.adapters.targets import TargetModule
from tenora.errors import TrainingError
from tenora.training.spec import LoraSpec
from tenora_kernels.layout import LoraTables

Float32Array = npt.NDArray[np.float32]


class TrainingSlots:
    """Master weights of one or more adapters of one base.

    Attributes:
        tables: what `add_lora` reads weights from and adds gradients to.
    """

    def __init__(self, targets: Sequence[TargetModule], adapters: Sequence[LoraSpec], *, device: torch.device) -> None:
        """Make room for `adapters`, one slot each, all weights zero.

        Raises:
            TrainingError: an adapter names no module of the base, or has a rank below 1.
        """
        self._targets = tuple(targets)
        self._ranks = [self._module_ranks(lora) for lora in adapters]
        in_features, out_features = [t.in_features for t in targets], [t.out_features for t in targets]
        sizes = [
            sum(r * (t.in_features + t.out_features) for r, t in zip(ranks, targets, strict=True))
            for ranks in self._ranks
        ]
        arena = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.tables = LoraTables.empty(
            arena, in_features=in_features, out_features=out_features, slots=len(adapters), grad=torch.zeros_like(arena)
        )
        self._spans: list[slice] = []
        start = 0
        for slot, (lora, ranks) in enumerate(zip(adapters, self._ranks, strict=True)):
            taken = self.tables.place(slot, start, ranks, [scaling(lora)] * len(ranks))
            self._spans.append(slice(start, start + taken))
            start += taken

    def weights(self, slot: int) -> Tensor:
        """float32 [n], a view of the slot's master weights."""
        return self.tables.arena[self._spans[slot]]

    def grad(self, slot: int) -> Tensor:
        """float32 [n], a view of the slot's gradient."""
        if self.tables.grad is None:
            raise TrainingError("Training slots were built without gradients.")
        return self.tables.grad[self._spans[slot]]

    def initialise(self, slot: int, seed: int) -> None:
        """Set A uniform in ±1/√in (PEFT's Kaiming initialisation) and B zero, so that the adapter begins as the base.

        Numbers come from a generator of its own: equal seeds give equal weights, and no global state moves.
        """
        generator = torch.Generator().manual_seed(seed)
        for target in self._modules(slot):
            bound = 1 / math.sqrt(target.in_features)
            a = self.tables.a(target.row, slot)
            a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
            self.tables.bt(target.row, slot).zero_()

    def export(self, slot: int) -> dict[str, tuple[Float32Array, Float32Array]]:
        """The adapter per module path: A [r, in] and B [out, r], float32 copies on the host."""
        return {
            target.path: (
                self.tables.a(target.row, slot).cpu().numpy().copy(),
                np.ascontiguousarray(self.tables.bt(target.row, slot).t().cpu().numpy()),
            )
            for target in self._modules(slot)
        }

    def _modules(self, slot: int) -> list[TargetModule]:
        return [target for target, rank in zip(self._targets, self._ranks[slot], strict=True) if rank]

    def _module_ranks(self, lora: LoraSpec) -> list[int]:
        known = {target.name for target in self._targets}
        unknown = [name for name in lora.target_modules if name not in known]
        if unknown or not lora.target_modules:
            raise TrainingError(
                f"The base has no module {unknown or 'at all that was named'}; it has {', '.join(sorted(known))}."
            )
        if lora.rank < 1:
            raise TrainingError(f"The rank is {lora.rank} and must be at least 1.")
        return [lora.rank if target.name in lora.target_modules else 0 for target in self._targets]


def scaling(lora: LoraSpec) -> float:
    """What multiplies x·Aᵀ·Bᵀ: alpha / rank, or alpha / √rank with rsLoRA."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)
