"""Transfer: an adapter begins as another one (`init_from`)."""

from __future__ import annotations

from pathlib import Path

from tenora.adapters.peft_format import read_adapter
from tenora.adapters.safetensors_file import as_float32
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterWeights
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
        {path: (as_float32(module.a), as_float32(module.b), module.scaling) for path, module in found.modules.items()}
    )
    return found
