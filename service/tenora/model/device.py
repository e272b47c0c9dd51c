"""Whether a device still works after something on it went wrong: one answer for serving, training and loading."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tenora.errors import DeviceLostError

PROBES: dict[str, Callable[[torch.device], None]] = {"cuda": torch.cuda.synchronize}
"""By type of device: waits for all that it was given, and raises if it has failed for good. A CPU needs none."""


def survive(error: BaseException, device: torch.device) -> None:
    """Return if `device` works in spite of `error`, so that whoever caught it may go on.

    After an illegal access or a failed assertion of a kernel a CUDA context is dead: every later call fails, with the
    same error or, of the allocator, with one that reads like another. Memory that ran out is asked about, too.

    Raises:
        DeviceLostError: it does not work any more. Only a new process does.
    """
    probe = PROBES.get(device.type)
    if probe is None:
        return
    try:
        probe(device)
    except Exception as found:  # noqa: BLE001  # whatever it says, it does not work
        raise DeviceLostError(f"{device} is lost ({type(found).__name__}: {found}), after: {error}") from error
