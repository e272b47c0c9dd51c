"""How much of the device's memory an adapter takes, known before any weight is read. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from tenora.errors import AdapterFormatError

ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load of any kernel
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# The smallest magnitude that rounds to infinity. float32 holds all that a file's values are read as.
_OVERFLOWS = {"float16": (2 - 2**-11) * 2.0**15, "bfloat16": (2 - 2**-8) * 2.0**127}


@dataclass(frozen=True, slots=True)
class ArenaRoom:
    """The memory that the engine has for adapters.

    Attributes:
        nbytes: of the arena, all slots together.
        slots: adapters that it holds at most.
        dtype: of the arena.
        keeps_bfloat16: a bfloat16 adapter lies as such in an arena of float32 (on the CPU).
    """

    nbytes: int
    slots: int
    dtype: str
    keeps_bfloat16: bool

    @property
    def largest(self) -> float:
        """Weights of this magnitude or more become infinite in the arena."""
        return _OVERFLOWS.get(self.dtype, float("inf"))

    def bytes_of(self, parameters: int, *, bfloat16: bool = False) -> int:
        """What an adapter of so many weights takes; `bfloat16` if all of its file is."""
        item = 2 if bfloat16 and self.keeps_bfloat16 else _ITEM_BYTES[self.dtype]
        return -(-parameters * item // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def require(self, nbytes: int) -> None:
        """Raise AdapterFormatError if an adapter of this size can never be served."""
        usable = self.nbytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if nbytes > usable:
            raise too_large(nbytes, usable)


def too_large(nbytes: int, pool: int) -> AdapterFormatError:
    """The error of an adapter that takes more than all of the pool."""
    return AdapterFormatError(
        f"The adapter takes {nbytes} bytes on the device, and all of the pool has {pool}: it can never be served. "
        "Train a lower rank or fewer modules, or have the operator raise TENORA_ADAPTER_POOL_BYTES.",
        code="adapter_too_large",
    )
