"""What went wrong with a run, as a code and a sentence for its owner."""

from __future__ import annotations

import errno

from tenora.errors import TenoraError
from tenora.model.out_of_memory import is_out_of_memory


def explain(error: Exception, step: int) -> tuple[str, str]:
    """Code and message of an error that ended a run after optimizer step `step`."""
    if isinstance(error, TenoraError):
        return error.code or "training_failed", error.message
    if is_out_of_memory(error):
        advice = "use a smaller rank, shorter rows or a smaller batch_size"
        return "out_of_memory", f"Memory ran out at step {step + 1}; {advice}."
    if isinstance(error, OSError):
        code = "storage_full" if error.errno == errno.ENOSPC else "storage_error"
        return code, f"A file of the run could not be read or written after step {step}: {error.strerror or error}."
    return "internal_error", f"The run stopped after step {step} with an unexpected error: {error}"
