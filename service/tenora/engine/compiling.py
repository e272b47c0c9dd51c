"""Compiles the CPU's kernels beside the download and the load of the base: `python -m tenora.engine.compiling LOCK`.

LOCK is the number of an open descriptor (`tenora_kernels.cpu.runtime.cache.under_way`): while it is open, the engine
waits for this process. Standard input carries the settings and, where it is known, the model's directory.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

from tenora.config import Settings
from tenora.engine.client.child import available_cpus
from tenora.model.loading import resolve_device, resolve_dtype, wanted_kernels
from tenora.processes import die_with_parent
from tenora_kernels.cpu.precompile import plan, precompile
from tenora_kernels.cpu.runtime import cache


def main(lock: int) -> None:
    """Compile what the settings and the model ask for."""
    die_with_parent()
    launch = json.load(sys.stdin)
    settings = Settings.model_validate(launch["settings"])
    directory = None if launch["model_dir"] is None else Path(launch["model_dir"])
    torch.set_num_threads(1)  # it forks
    device = resolve_device(settings.device)
    if device.type == "cpu":
        wanted = wanted_kernels(directory, resolve_dtype(settings.dtype, device), train=settings.role != "serve")
        precompile(plan(wanted), settings.threads or available_cpus(), partial(cache.write_progress, lock))
    cache.note_complete(launch["name"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
