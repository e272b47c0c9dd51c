"""Transfer: an adapter begins as another one (`init_from`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tenora.adapters.peft_format import read_adapter
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterPart, AdapterWeights, LoraModule
from tenora.errors import AdapterFormatError, TrainingError
from tenora.training.arena import TrainedAdapter

_ANY_RANK = 2**16  # it was accepted when it was stored


def start_adapter(adapter: TrainedAdapter, directory: Path, rows: TableRows) -> AdapterWeights:
    """Let `adapter` begin as the PEFT adapter in `directory` does; see `TrainedAdapter.start_from`.

    Its heads, if it has any, are left to whoever learns one: they are in what is returned.

    Raises:
        TrainingError: it is gone, unreadable, or does not fit.
    """
    try:
        found = read_adapter(directory, rows, max_rank=_ANY_RANK)
    except (AdapterFormatError, OSError) as error:
        raise TrainingError(f"The starting adapter cannot be read: {error}", code="init_from_unreadable") from error
    adapter.start_from(
        {
            path: (wide(module, module.a), wide(module, module.b), module.scaling)
            for path, module in found.modules.items()
        }
    )
    return found


def wide(module: LoraModule | AdapterPart, array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """A matrix of a module or part as float32; bfloat16 comes as its bits."""
    if module.dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, dtype=np.float32)
